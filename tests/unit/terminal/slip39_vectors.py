"""Published test vectors of SLIP-0039 (its vectors.json; passphrase TREZOR): mnemonics and the secret, empty where there is none.

Those of one group, as a recovery kit uses it; 128 and 256 bits.
"""

VECTORS: list[tuple[list[str], str]] = [
    (
        [
            "duckling enlarge academic academic agency result length solution fridge kidney coal "
            "piece deal husband erode duke ajar critical decision keyboard",
        ],
        "bb54aac4b89dc868ba37d9cc21b2cece",
    ),
    (
        [
            "duckling enlarge academic academic agency result length solution fridge kidney coal "
            "piece deal husband erode duke ajar critical decision kidney",
        ],
        "",
    ),
    (
        [
            "duckling enlarge academic academic email result length solution fridge kidney coal "
            "piece deal husband erode duke ajar music cargo fitness",
        ],
        "",
    ),
    (
        [
            "shadow pistol academic always adequate wildlife fancy gross oasis cylinder mustang "
            "wrist rescue view short owner flip making coding armed",
            "shadow pistol academic acid actress prayer class unknown daughter sweater depict "
            "flip twice unkind craft early superior advocate guest smoking",
        ],
        "b43ceb7e57a0ea8766221624d01b0864",
    ),
    (
        [
            "shadow pistol academic always adequate wildlife fancy gross oasis cylinder mustang "
            "wrist rescue view short owner flip making coding armed",
        ],
        "",
    ),
    (
        [
            "adequate smoking academic acid debut wine petition glen cluster slow rhyme "
            "slow simple epidemic rumor junk tracks treat olympic tolerate",
            "adequate stay academic agency agency formal party ting frequent learn upstairs "
            "remember smear leaf damage anatomy ladle market hush corner",
        ],
        "",
    ),
    (
        [
            "device stay academic always dive coal antenna adult black exceed stadium "
            "herald advance soldier busy dryer daughter evaluate minister laser",
            "device stay academic always dwarf afraid robin gravity crunch adjust soul "
            "branch walnut coastal dream costume scholar mortgage mountain pumps",
        ],
        "",
    ),
    (
        [
            "hour painting academic academic device formal evoke guitar random modern justice "
            "filter withdraw trouble identify mailman insect general cover oven",
            "hour painting academic agency artist again daisy capital beaver fiber much "
            "enjoy suitable symbolic identify photo editor romp float echo",
        ],
        "",
    ),
    (
        [
            "guilt walnut academic acid deliver remove equip listen vampire tactics nylon "
            "rhythm failure husband fatigue alive blind enemy teaspoon rebound",
            "guilt walnut academic agency brave hamster hobo declare herd taste alpha "
            "slim criminal mild arcade formal romp branch pink ambition",
        ],
        "",
    ),
    (
        [
            "theory painting academic academic armed sweater year military elder discuss acne "
            "wildlife boring employer fused large satoshi bundle carbon diagnose anatomy hamster "
            "leaves tracks paces beyond phantom capital marvel lips brave detect luck",
        ],
        "989baf9dcaad5b10ca33dfd8cc75e42477025dce88ae83e75a230086a0e00e92",
    ),
    (
        [
            "theory painting academic academic armed sweater year military elder discuss acne "
            "wildlife boring employer fused large satoshi bundle carbon diagnose anatomy hamster "
            "leaves tracks paces beyond phantom capital marvel lips brave detect lunar",
        ],
        "",
    ),
    (
        [
            "humidity disease academic always aluminum jewelry energy woman receiver strategy amuse "
            "duckling lying evidence network walnut tactics forget hairy rebound impulse brother "
            "survive clothes stadium mailman rival ocean reward venture always armed unwrap",
            "humidity disease academic agency actress jacket gross physics cylinder solution fake "
            "mortgage benefit public busy prepare sharp friar change work slow purchase "
            "ruler again tricycle involve viral wireless mixture anatomy desert cargo upgrade",
        ],
        "c938b319067687e990e05e0da0ecce1278f75ff58d9853f19dcaeed5de104aae",
    ),
    (
        [
            "humidity disease academic always aluminum jewelry energy woman receiver strategy amuse "
            "duckling lying evidence network walnut tactics forget hairy rebound impulse brother "
            "survive clothes stadium mailman rival ocean reward venture always armed unwrap",
        ],
        "",
    ),
]
