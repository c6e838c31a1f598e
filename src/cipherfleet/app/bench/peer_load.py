"""Load on a peer, by its own client library; runs alone, on an interpreter that has those libraries and not this package.

A line of JSON with the configuration comes in, then one for each measurement: ``operation``, ``size``, ``connections``,
``seconds``. Each is answered with ``taken``, seconds for each operation that ended in time, or with ``error``.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

Job = Callable[[], object]
Jobs = dict[str, Callable[[bytes], Job]]

TIMEOUT_S = 5


def softhsm2(configuration: dict[str, Any]) -> Jobs:
    """A token behind ``p11-kit server``. Its remoting passes no mechanism that has parameters: no GCM and no CBC, but ECB."""
    import pkcs11
    from pkcs11.util.ec import encode_named_curve_parameters

    token = pkcs11.lib(configuration["module"]).get_token(token_label=configuration["label"])
    session = token.open(user_pin=configuration["pin"], rw=True)
    key = session.generate_key(pkcs11.KeyType.AES, 256)
    curve = {pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
    _, private = session.create_domain_parameters(pkcs11.KeyType.EC, curve, local=True).generate_keypair()

    def sign(data: bytes) -> Job:
        digest = pkcs11.Mechanism.SHA256  # in the token, as the others do: the message goes there
        return lambda: private.sign(session.digest(data, mechanism=digest), mechanism=pkcs11.Mechanism.ECDSA)

    return {
        "encrypt": lambda data: lambda: key.encrypt(data, mechanism=pkcs11.Mechanism.AES_ECB),
        "sign": sign,
        "digest": lambda data: lambda: session.digest(data, mechanism=pkcs11.Mechanism.SHA256),
        "random": lambda data: lambda: session.generate_random(len(data) * 8),
    }


def moto(configuration: dict[str, Any]) -> Jobs:
    """The KMS of ``moto_server``, over TLS, which takes at most 4 KiB, and gives at most 1 KiB."""
    import boto3
    from botocore.config import Config

    access = {"aws_access_key_id": "bench", "aws_secret_access_key": "bench", "region_name": "us-east-1"}
    patience = Config(connect_timeout=TIMEOUT_S, read_timeout=TIMEOUT_S, retries={"total_max_attempts": 1})
    client = boto3.session.Session().client("kms", endpoint_url=configuration["url"], verify=False, config=patience, **access)
    key = client.create_key()["KeyMetadata"]["KeyId"]
    signer = client.create_key(KeySpec="ECC_NIST_P256", KeyUsage="SIGN_VERIFY")["KeyMetadata"]["KeyId"]
    return {
        "encrypt": lambda data: lambda: client.encrypt(KeyId=key, Plaintext=data),
        "sign": lambda data: lambda: client.sign(KeyId=signer, Message=data, SigningAlgorithm="ECDSA_SHA_256"),
        "random": lambda data: lambda: client.generate_random(NumberOfBytes=len(data)),
    }


def pykmip(configuration: dict[str, Any]) -> Jobs:
    """PyKMIP's server, over mutual TLS; it neither signs on curves nor digests nor draws random bytes."""
    from kmip import enums
    from kmip.pie.client import ProxyKmipClient

    files = {name: configuration[name] for name in ("cert", "key", "ca")}
    client = ProxyKmipClient(hostname="127.0.0.1", port=configuration["port"], ssl_version="PROTOCOL_TLSv1_2", **files)
    client.open()
    uses = [enums.CryptographicUsageMask.ENCRYPT, enums.CryptographicUsageMask.DECRYPT]
    key = client.create(enums.CryptographicAlgorithm.AES, 256, cryptographic_usage_mask=uses)
    client.activate(key)
    how = {
        "cryptographic_algorithm": enums.CryptographicAlgorithm.AES,
        "block_cipher_mode": enums.BlockCipherMode.GCM,
        "random_iv": True,
        "tag_length": 16,
    }
    return {"encrypt": lambda data: lambda: client.encrypt(data, uid=key, cryptographic_parameters=how, iv_counter_nonce=os.urandom(12))}


PEERS: dict[str, Callable[[dict[str, Any]], Jobs]] = {"softhsm2": softhsm2, "moto": moto, "pykmip": pykmip}


def load(jobs: list[Job], seconds: float) -> list[float]:
    """Each job in a thread of its own, again and again; the seconds of every time that ended in time. Raises as a job does."""
    taken: list[float] = []
    failed: list[Exception] = []
    begin = threading.Barrier(len(jobs))

    def work(job: Job) -> None:
        begin.wait()
        began = time.perf_counter()
        end = began + seconds
        try:
            while began < end:
                job()
                now = time.perf_counter()
                if now <= end:
                    taken.append(round(now - began, 7))
                began = now
        except Exception as exc:
            failed.append(exc)

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return taken


def answer(opened: list[Jobs], ask: dict[str, Any]) -> dict[str, Any]:
    jobs = [jobs.get(ask["operation"]) for jobs in opened[: ask["connections"]]]
    data = os.urandom(ask["size"])
    try:
        ready = [job(data) for job in jobs if job is not None]
        if not ready:
            return {"error": "not offered"}
        ready[0]()  # connected, warm, and possible at all
        return {"taken": load(ready, ask["seconds"])}
    except Exception as exc:
        return {"error": f"{type(exc).__name__}: {exc}"[:200]}


def main() -> None:
    def say(said: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()

    configuration = json.loads(sys.stdin.readline())
    try:
        opened = [PEERS[configuration["peer"]](configuration) for _ in range(configuration["connections"])]
    except Exception as exc:
        say({"error": f"{type(exc).__name__}: {exc}"[:200]})
        return
    say({"ready": True})
    for line in sys.stdin:
        say(answer(opened, json.loads(line)))


if __name__ == "__main__":
    main()
