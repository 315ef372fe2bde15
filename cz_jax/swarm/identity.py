"""Who a peer is: a key pair in a file, the peer id that follows from it, and signatures.

The file is libp2p's private key message, `08 <type> 12 <length> <key>`: RSA-2048 as PKCS#1 DER (type 0, the swarm.pem
of RL Swarm, which is no PEM) or Ed25519 as seed and public key (type 1). A peer id is the base58 of a multihash of the
public key message: SHA-256 for RSA, the message itself for Ed25519.

What this does not protect: the file is not encrypted; whoever reads it is the peer.
"""

import functools
import hashlib
import os
import pathlib
import stat
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa

from cz_jax.errors import UserError
from cz_jax.swarm.words import ADJECTIVES, ANIMALS, NOUNS

KINDS = ("ed25519", "rsa")
MAX_FILE_BYTES = 1 << 16
RSA_PUBLIC_PREFIX = bytes.fromhex("080012a602")  # type 0, then 294 bytes of SubjectPublicKeyInfo
ED25519_PUBLIC_PREFIX = bytes.fromhex("08011220")  # type 1, then 32 bytes
RSA_SPKI_BYTES = 294
KEYS_KEPT = 1024  # public keys, read once while their peers go on publishing

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"

# y coordinates of the eight points whose order divides 8, and the two that only a non-canonical encoding has. Under
# such a key one signature fits any message, and the library below accepts it.
_P = 2**255 - 19
_Y8 = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
SMALL_ORDER_Y = frozenset({0, 1, _P - 1, _P, _P + 1, _Y8, _P - _Y8})


class IdentityError(UserError):
    """An identity file that cannot be read, or may not be written."""


@dataclass(frozen=True)
class Identity:
    """A key pair. `public_bytes` is libp2p's public key message; the private key is never shown."""

    kind: str  # "rsa" or "ed25519"
    public_bytes: bytes = field(repr=False)
    _key: object = field(repr=False, compare=False)

    @property
    def peer_id(self) -> str:
        return peer_id_of(self.public_bytes)

    @property
    def name(self) -> str:
        return friendly_name(self.peer_id)

    def sign(self, message: bytes) -> bytes:
        """64 bytes for Ed25519; 256 for RSA (PKCS#1 v1.5 over SHA-256, as libp2p signs)."""
        if self.kind == "rsa":
            return self._key.sign(message, padding.PKCS1v15(), hashes.SHA256())
        return self._key.sign(message)


def new_identity(kind: str = "ed25519") -> Identity:
    """A fresh key pair of `kind` ("ed25519" or "rsa", which is RSA-2048)."""
    if kind not in KINDS:
        raise IdentityError(f"{kind!r} is not a kind of identity", f"known: {', '.join(KINDS)}")
    if kind == "rsa":
        return _identity(rsa.generate_private_key(public_exponent=65537, key_size=2048))
    return _identity(ed25519.Ed25519PrivateKey.generate())


def write_identity(identity: Identity, path) -> None:
    """Keep `identity` in a new file of mode 0400. IdentityError where something is at `path` already."""
    path = pathlib.Path(path)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
    except FileExistsError:
        raise IdentityError(f"{path} exists", "an identity is never overwritten", "name another file") from None
    except FileNotFoundError:
        raise IdentityError(f"there is no folder {path.parent}", "", f"mkdir -p {path.parent}") from None
    except (OSError, ValueError) as e:
        raise IdentityError(f"{path} cannot be written: {getattr(e, 'strerror', None) or e}") from None
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, 0o400)
            file.write(_private_message(identity))
            file.flush()
            os.fsync(fd)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def read_identity(path) -> Identity:
    """The identity in the file `path`. IdentityError for anything that is not one whole key of a known kind."""
    path = pathlib.Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device could be waited on for ever
            raise IdentityError(f"{path} is not a regular file", "a folder, a pipe or a device was named")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise IdentityError(f"{path} does not exist", "", f"cz-jax identity new {path}") from None
    except (OSError, ValueError) as e:
        raise IdentityError(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}") from None
    try:
        return _identity(_private_key(*_private_fields(data)))
    except ValueError as e:
        raise IdentityError(f"{path} is no identity: {e}", "half a copy, or another file?") from None


def exposure(path) -> str | None:
    """A sentence where others than the owner may read the file, else None."""
    mode = stat.S_IMODE(pathlib.Path(path).stat().st_mode)
    if mode & 0o077:
        return f"{path} can be read by others (mode {mode:04o}): chmod 400 {path}"
    return None


def verify(public_bytes: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` over `message` is by the key in `public_bytes`. False too for a key that is malformed, of an
    unknown kind, or an Ed25519 point of small order."""
    try:
        key = _public_key(public_bytes)
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, message, padding.PKCS1v15(), hashes.SHA256())
        else:
            key.verify(signature, message)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        return False
    return True


@functools.lru_cache(KEYS_KEPT)
def peer_id_of(public_bytes: bytes) -> str:
    """The peer id of a public key message. ValueError for one that `verify` would refuse."""
    _public_key(public_bytes)
    if public_bytes.startswith(ED25519_PUBLIC_PREFIX):
        return base58(b"\x00\x24" + public_bytes)
    return base58(b"\x12\x20" + hashlib.sha256(public_bytes).digest())


def friendly_name(peer_id: str) -> str:
    """Three words that stand for `peer_id` where people read: 262,144 names, so two peers may share one."""
    first, second, third = hashlib.sha256(peer_id.encode()).digest()[:3]
    return f"{ADJECTIVES[first % 64]}-{NOUNS[second % 64]}-{ANIMALS[third % 64]}"


def base58(data: bytes) -> str:
    """`data` in Bitcoin's base 58; each leading zero byte is a "1"."""
    number, digits = int.from_bytes(data, "big"), ""
    while number:
        number, rest = divmod(number, 58)
        digits = _BASE58[rest] + digits
    return "1" * (len(data) - len(data.lstrip(b"\x00"))) + digits


def _identity(key) -> Identity:
    public = key.public_key()
    if isinstance(key, rsa.RSAPrivateKey):
        spki = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        return Identity("rsa", RSA_PUBLIC_PREFIX + spki, key)
    return Identity("ed25519", ED25519_PUBLIC_PREFIX + public.public_bytes_raw(), key)


def _private_message(identity: Identity) -> bytes:
    if identity.kind == "rsa":
        form = (
            serialization.Encoding.DER,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
        kind, key = 0, identity._key.private_bytes(*form)
    else:
        kind, key = 1, identity._key.private_bytes_raw() + identity._key.public_key().public_bytes_raw()
    return bytes([0x08, kind, 0x12]) + _varint(len(key)) + key


def _private_fields(data: bytes) -> tuple[int, bytes]:
    """(type, key) of a private key message that fills `data`."""
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"it is larger than {MAX_FILE_BYTES} bytes")
    if data.startswith(b"-----BEGIN"):
        raise ValueError("it is a PEM file, and an identity is libp2p's private key message (swarm.pem is no PEM)")
    if len(data) < 4 or data[0] != 0x08 or data[2] != 0x12:
        raise ValueError("it does not begin like libp2p's private key message (08 type 12 length)")
    length, at = 0, 3
    for shift in range(0, 21, 7):
        if at >= len(data):
            break
        byte, at = data[at], at + 1
        length |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    if len(data) - at != length:
        raise ValueError(f"its key should be {length} bytes long and {len(data) - at} are there")
    return data[1], data[at:]


def _private_key(kind: int, key: bytes):
    if kind == 1:
        if len(key) != 64:
            raise ValueError(f"an Ed25519 key is 64 bytes long, not {len(key)}")
        private = ed25519.Ed25519PrivateKey.from_private_bytes(key[:32])
        if private.public_key().public_bytes_raw() != key[32:]:
            raise ValueError("the two halves of its Ed25519 key do not belong together")
        return private
    if kind != 0:
        raise ValueError(f"key type {kind} is not known (0 is RSA, 1 is Ed25519)")
    try:
        private = serialization.load_der_private_key(key, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError("its RSA key is no PKCS#1 DER") from None
    if not isinstance(private, rsa.RSAPrivateKey) or private.key_size != 2048:
        raise ValueError("its key is not RSA-2048")
    return private


@functools.lru_cache(KEYS_KEPT)
def _public_key(message: bytes):
    """The key in a public key message. ValueError unless it is RSA-2048 or Ed25519 of large order, spelled exactly."""
    if message.startswith(ED25519_PUBLIC_PREFIX) and len(message) == len(ED25519_PUBLIC_PREFIX) + 32:
        raw = message[len(ED25519_PUBLIC_PREFIX) :]
        if int.from_bytes(raw, "little") & ((1 << 255) - 1) in SMALL_ORDER_Y:
            raise ValueError("an Ed25519 key of small order signs anything")
        return ed25519.Ed25519PublicKey.from_public_bytes(raw)
    if message.startswith(RSA_PUBLIC_PREFIX) and len(message) == len(RSA_PUBLIC_PREFIX) + RSA_SPKI_BYTES:
        key = serialization.load_der_public_key(message[len(RSA_PUBLIC_PREFIX) :])
        if isinstance(key, rsa.RSAPublicKey) and key.key_size == 2048:
            return key
    raise ValueError("not the public key message of RSA-2048 or Ed25519")


def _varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
