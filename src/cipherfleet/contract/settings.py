"""Every setting of a cloud, in one typed place: default, unit and what it does. Stored in ``cloud.json`` of the state."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

AuditData = Literal["counted", "sampled", "full"]
LauncherChoice = Literal["auto", "zygote"]


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    heartbeat_s: Annotated[float, Meta(gt=0, le=60, description="how often the Ukey signs the lease, seconds")] = 2.0
    lease_s: Annotated[float, Meta(gt=0, le=3600, description="how long a lease lasts from the card's nonce, seconds")] = 6.0
    monitor_s: Annotated[float, Meta(gt=0, le=60, description="how often the monitor looks and the scheduler plans, seconds")] = 1.0
    challenge_s: Annotated[float, Meta(gt=0, le=600, description="how long an identity challenge may be answered, seconds")] = 30.0
    step_s: Annotated[float, Meta(gt=0, le=600, description="how long one step of a creation or deletion may take, seconds")] = 20.0
    vcm_certificate_s: Annotated[float, Meta(ge=2, le=86400, description="lifetime of a VCM's certificate, renewed at half, seconds")] = (
        600.0
    )
    process_certificate_days: Annotated[int, Meta(ge=1, le=825, description="lifetime of a platform certificate, days")] = 90
    application_days: Annotated[int, Meta(ge=1, le=825, description="default lifetime of an application's certificate, days")] = 365
    vcms_per_machine: Annotated[int, Meta(ge=1, le=4096, description="how many VCMs one cipher machine takes")] = 64
    vcm_cpus: Annotated[int, Meta(ge=1, le=1024, description="virtual CPUs of a VCM (processors it may run on)")] = 1
    vcm_memory_mib: Annotated[int, Meta(ge=128, le=1048576, description="virtual memory of a VCM, MiB")] = 1024
    vcm_files: Annotated[int, Meta(ge=64, le=1048576, description="open files of a VCM")] = 1024
    launcher: Annotated[
        LauncherChoice,
        Meta(description="how VCMs start: auto is bubblewrap, else unshare; zygote forks them, where that works"),
    ] = "auto"
    keys_per_consumer: Annotated[int, Meta(ge=1, le=1_000_000, description="keys of a consumer, deleted ones included")] = 200_000
    versions_per_consumer: Annotated[
        int, Meta(ge=2, le=4_000_000, description="rows of a consumer in the escrow: the attributes and each version of its keys")
    ] = 1_000_000
    changes_per_consumer: Annotated[
        int, Meta(ge=2048, le=8_000_000, description="changes of a consumer's keys and applications in all; each VCM reads all of them")
    ] = 2_000_000
    aliases_per_consumer: Annotated[int, Meta(ge=0, le=1_000_000, description="aliases of a consumer in all")] = 100_000
    tags_per_consumer: Annotated[int, Meta(ge=0, le=10_000_000, description="tags of a consumer's keys in all")] = 500_000
    escrow_mib_per_consumer: Annotated[int, Meta(ge=1, le=65536, description="wrapped keys and attributes of a consumer, MiB")] = 1024
    deletion_days: Annotated[int, Meta(ge=1, le=365, description="how long a key waits for its deletion, and at most, days")] = 30
    deletion_days_min: Annotated[float, Meta(ge=0, le=365, description="how long it waits at least, days")] = 7
    chores_s: Annotated[float, Meta(gt=0, le=3600, description="how often a VCM looks for keys to rotate or destroy, seconds")] = 10.0
    import_token_s: Annotated[float, Meta(gt=0, le=604800, description="how long an import token is good, seconds")] = 86400.0
    aliases_per_key: Annotated[int, Meta(ge=0, le=50, description="how many aliases a key may have")] = 50
    tags_per_key: Annotated[int, Meta(ge=0, le=50, description="how many tags a key may have")] = 50
    audit_data: Annotated[
        AuditData,
        Meta(description="operations on data in the audit log: counted (alike ones together), sampled, or full (each, before it is done)"),
    ] = "counted"
    audit_sample_rate: Annotated[float, Meta(gt=0, le=1, description="of sampled operations on data: the part that has an entry")] = 0.01
    audit_flush_s: Annotated[float, Meta(gt=0, le=3600, description="how often a VCM tells what was done with data, seconds")] = 30.0
    audit_seal_entries: Annotated[int, Meta(ge=1, le=100_000, description="entries of an audit log after which the HSM seals it")] = 256
    audit_seal_s: Annotated[float, Meta(gt=0, le=86400, description="how long an audit entry waits for its seal at most, seconds")] = 60.0
    argon2_memory_kib: Annotated[int, Meta(ge=8192, description="memory of the PIN's and passphrase's Argon2id, KiB")] = 65536
    argon2_iterations: Annotated[int, Meta(ge=1, description="passes of the PIN's and passphrase's Argon2id")] = 3
