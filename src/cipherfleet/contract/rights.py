"""The rights of applications."""

from enum import StrEnum


class Right(StrEnum):
    """What an application may do in its domain."""

    CREATE = "create"
    SHOW = "show"
    MANAGE = "manage"
    ENCRYPT = "encrypt"
    DECRYPT = "decrypt"
    SIGN = "sign"
    VERIFY = "verify"
    MAC = "mac"
    DERIVE = "derive"
    DIGEST = "digest"
    RANDOM = "random"
