"""Every event of an audit log, by name. A test holds the list against the code, the reference is written from it."""

DATA_EVENT = "data-"
"""How the events of operations on data begin; the operation's name follows."""

PLATFORM_EVENTS: dict[str, str] = {
    "enrolled": "a consumer was enrolled (outcome pending: its Ukey is not written yet)",
    "enrolment-removed": "an enrolment that was not finished was taken back",
    "ukey-revoked": "a Ukey was revoked for good, by the operator or by another Ukey of the consumer",
    "ukey-added": "the Ukey signed a spare one in",
    "policy-set": "a Ukey of the consumer set the policy; the subject is its name and the statement's number",
    "terminal-joined": "a Ukey was plugged in: its terminal connected",
    "terminal-channel": "a terminal's channel was refused",
    "identity-verified": "the Ukey proved the consumer's identity, for a creation or a deletion (or an attempt was refused)",
    "token-created": "a token for a new VCM",
    "token-revoked": "a token was revoked before it was used",
    "vcm-authorised": "a VCM was placed on a machine and bound to its token",
    "vcm-certified": "a VCM got its certificate (or an attempt was refused)",
    "vcm-channel": "a VCM's channel was refused",
    "cmk-release-refused": "the terminal did not release the CMK to a VCM",
    "cmk-released": "the terminal released the CMK to a VCM's card",
    "cmk-loaded": "a card combined both shares of the CMK, or refused them",
    "serving": "a VCM serves",
    "lease-started": "the first lease of a VCM was countersigned",
    "lease-stopped": "a VCM that had a lease gets no more",
    "vcm-revoked": "a VCM's token, certificates and leases were revoked; the subject says why",
    "service-revoked": "all of a consumer's service was revoked; the subject says why (ukey-removed: it was pulled)",
    "application-signed-in": "the Ukey signed an application in",
    "application-signed-out": "the Ukey signed an application out",
    "application-revoked": "the operator revoked an application",
    "key-delegated": "an application that the Ukey lets delegate gave another one of its rights with a key",
    "key-delegation-revoked": "an application took back what it had delegated",
    "certificate-issued": "a process of the platform, or the operator, got a certificate (the operator's own log)",
    "card-certified": "a card was certified (the operator's own log)",
    "restored": "the KMC's database was restored from a backup",
    "restore-accepted": "the Ukey accepted a restored escrow: a new epoch began",
    "management-events-began": "management numbers its events anew: at its first start, or after a restore (the operator's own log)",
    "refused": "many refused attempts of many kinds, counted together",
}

MANAGEMENT_EVENTS: dict[str, str] = {
    "vcm-ordered": "a VCM is to be built, for the operator, a Ukey that came (consumer), or in the place of a lost one (scheduler)",
    "vcm-migration-ordered": "a VCM is to take another one's place",
    "vcm-failed": "a VCM did not come to life, or was given up; the outcome says why",
    "vcm-deletion-ordered": "a VCM is to be deleted; the subject says why (operator: by force, without the Ukey)",
    "vcm-deletion-refused": "a deletion that was ordered is not allowed; the VCM stays",
    "vcm-deleted": "nothing is left of a VCM but its history",
    "vcm-limits-set": "the operator limited a VCM, and those that come after it",
    "domain-allotted": "a consumer got its security domain",
    "domain-removed": "a consumer's security domain was given up",
    "machine-registered": "a cipher machine joined, or moved to another address (the operator's own log)",
    "events-dropped": "the KMC was not there for so long that management dropped some of these events; the subject says how many",
}
"""What the management platform decided, and what became of it: its own word, all that it may write."""

KEY_EVENTS: dict[str, str] = {
    "key-create": "a key was made in a card",
    "key-import": "a key was brought by an application",
    "key-derive": "a key was derived from another one in a card",
    "key-rotate": "a key got a new version",
    "key-enable": "a key was enabled",
    "key-disable": "a key was disabled",
    "key-update": "a key's label, tags, description or terms were changed",
    "key-schedule-deletion": "a key was scheduled for deletion",
    "key-cancel-deletion": "a scheduled deletion was cancelled",
    "key-destroy": "a key, or versions of it, were destroyed",
    "key-trim": "old versions of a key were destroyed",
    "key-uses-reserved": "a VCM reserved uses of a key that has a limit of them",
    "key-consent": "a first application consented to what needs two",
    "alias-set": "an alias was set",
    "alias-delete": "an alias was deleted",
    "escrow-written": "a VCM wrote rows and gave no event",
}
"""What VCMs say of changes to keys, one entry for each key."""
