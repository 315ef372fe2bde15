"""Peer identities: the file format, peer ids, names, signatures, and what a careless or hostile file gets."""

import os
import re
import stat

import pytest

from cz_jax.swarm import identity as room
from cz_jax.swarm.identity import IdentityError, base58, new_identity, peer_id_of, read_identity, verify, write_identity

P = 2**255 - 19
D = -121665 * pow(121666, -1, P) % P


@pytest.fixture(scope="module")
def rsa_identity():
    return new_identity("rsa")


def identity_of(kind, rsa_identity):
    return rsa_identity if kind == "rsa" else new_identity(kind)


def test_known_swarm_pem(shared, tmp_path):
    path = shared / "identity" / "swarm_test_vector.pem"
    read = read_identity(path)
    assert read.peer_id == "QmfB2Qi41qyQqMUeiw6GLmFbhJcf61poZEi39vTvj7Laye"
    assert read.kind == "rsa" and read.name == "kind-paper-kestrel"
    write_identity(read, tmp_path / "copy.pem")
    assert (tmp_path / "copy.pem").read_bytes() == path.read_bytes()


def test_known_ed25519_peer_id():
    # The public key and peer id of RFC 8032's first test key; the prefix 12D3KooW is libp2p's for every Ed25519 key.
    public = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    peer_id = peer_id_of(room.ED25519_PUBLIC_PREFIX + public)
    assert peer_id.startswith("12D3KooW") and len(peer_id) == 52
    number = 0
    for digit in peer_id:
        number = number * 58 + "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz".index(digit)
    assert number.to_bytes(38, "big") == b"\x00\x24\x08\x01\x12\x20" + public


@pytest.mark.parametrize(
    "data, text", [(b"", ""), (b"\0\0", "11"), (b"hello world", "StV1DL6CwTryKyV"), (b"\0a", "12g")]
)
def test_base58(data, text):
    assert base58(data) == text


@pytest.mark.parametrize("kind", room.KINDS)
def test_round_trip_and_signatures(kind, rsa_identity, tmp_path):
    mine, other = identity_of(kind, rsa_identity), new_identity("ed25519")
    write_identity(mine, tmp_path / "key")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o400
    again = read_identity(tmp_path / "key")
    assert (again.peer_id, again.public_bytes, again.kind) == (mine.peer_id, mine.public_bytes, kind)
    signature = again.sign(b"a message")
    assert verify(mine.public_bytes, b"a message", signature)
    assert not verify(mine.public_bytes, b"another message", signature)
    assert not verify(mine.public_bytes, b"a message", signature[:-1])
    assert not verify(mine.public_bytes, b"a message", b"")
    assert not verify(mine.public_bytes, b"a message", bytes([signature[0] ^ 1]) + signature[1:])
    assert not verify(other.public_bytes, b"a message", signature)


def test_names_are_three_words_and_follow_the_peer_id():
    first, second = new_identity(), new_identity()
    assert re.fullmatch("[a-z]+-[a-z]+-[a-z]+", first.name)
    assert room.friendly_name(first.peer_id) == first.name
    assert len({room.friendly_name(f"peer {i}") for i in range(200)}) > 190
    assert first.peer_id != second.peer_id
    assert {len(words) for words in (room.ADJECTIVES, room.NOUNS, room.ANIMALS)} == {64}
    assert {len(set(words)) for words in (room.ADJECTIVES, room.NOUNS, room.ANIMALS)} == {64}


def test_never_overwrites(tmp_path):
    path = tmp_path / "key"
    write_identity(new_identity(), path)
    before = path.read_bytes()
    with pytest.raises(IdentityError, match="never overwritten"):
        write_identity(new_identity(), path)
    assert path.read_bytes() == before
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IdentityError):
        write_identity(new_identity(), tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_identity(new_identity(), tmp_path / "key")
    assert list(tmp_path.iterdir()) == []


def test_missing_folder(tmp_path):
    with pytest.raises(IdentityError, match="mkdir -p"):
        write_identity(new_identity(), tmp_path / "no" / "key")


def test_private_key_is_never_shown(rsa_identity):
    for mine in (new_identity(), rsa_identity):
        assert repr(mine) == f"Identity(kind='{mine.kind}')"


def test_exposed_file_is_told(tmp_path):
    path = tmp_path / "key"
    write_identity(new_identity(), path)
    assert room.exposure(path) is None
    path.chmod(0o644)
    assert "chmod 400" in room.exposure(path)


def test_malformed_files(tmp_path, rsa_identity):
    whole = room._private_message(new_identity())
    rsa = room._private_message(rsa_identity)
    swapped = whole[:36] + bytes(32)
    bad = {
        "empty": b"",
        "two bytes": b"\x08\x00",
        "no length": b"\x08\x01\x12\xff\xff\xff",
        "pem": b"-----BEGIN PRIVATE KEY-----\n",
        "text": b"hello there, this is text",
        "cut": whole[:-1],
        "longer": whole + b"\x00",
        "rsa cut": rsa[: len(rsa) // 2],
        "rsa rubbish": rsa[:6] + bytes(len(rsa) - 6),
        "ed25519 as rsa": b"\x08\x00" + whole[2:],
        "rsa as ed25519": b"\x08\x01" + rsa[2:],
        "unknown type": b"\x08\x02" + whole[2:],
        "halves that differ": swapped,
        "huge": b"\x08\x01\x12" + bytes(1 << 17),
    }
    for name, data in bad.items():
        (tmp_path / "key").write_bytes(data)
        with pytest.raises(IdentityError) as caught:
            read_identity(tmp_path / "key")
        assert "\n" not in str(caught.value) and "is no identity" in str(caught.value), name


def test_what_is_no_file(tmp_path):
    with pytest.raises(IdentityError, match="identity new"):
        read_identity(tmp_path / "absent")
    with pytest.raises(IdentityError, match="regular file"):
        read_identity(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(IdentityError, match="regular file"):
        read_identity(tmp_path / "pipe")
    with pytest.raises(IdentityError):
        read_identity("a\0b")
    with pytest.raises(IdentityError):
        new_identity("dsa")


def test_public_keys_that_are_refused(rsa_identity):
    mine = new_identity()
    message, signature = b"m", mine.sign(b"m")
    for public in (b"", mine.public_bytes[:-1], mine.public_bytes + b"\0", b"\x08\x02" + mine.public_bytes[2:]):
        assert not verify(public, message, signature)
        with pytest.raises(ValueError):
            peer_id_of(public)
    mangled = rsa_identity.public_bytes[:20] + bytes(len(rsa_identity.public_bytes) - 20)
    assert not verify(mangled, message, rsa_identity.sign(message))


def add(p, q):
    """The sum of two points of edwards25519 (RFC 8032, 5.1), affine."""
    (x1, y1), (x2, y2) = p, q
    k = D * x1 * x2 * y1 * y2 % P
    return (x1 * y2 + x2 * y1) * pow(1 + k, -1, P) % P, (y1 * y2 + x1 * x2) * pow(1 - k, -1, P) % P


def points_with(y):
    """Every point of the curve with this y."""
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    roots = {r * x % P for r in (1, pow(2, (P - 1) // 4, P))}
    return {(s, y % P) for r in roots if r * r % P == square for s in (r, -r % P)}


def test_small_order_list_is_every_point_whose_order_divides_eight():
    points = {p for y in room.SMALL_ORDER_Y for p in points_with(y)}
    assert len(points) == 8  # the whole torsion subgroup of a curve with cofactor 8
    for point in points:
        for _ in range(3):
            point = add(point, point)
        assert point == (0, 1)


@pytest.mark.parametrize("y", sorted(room.SMALL_ORDER_Y))
@pytest.mark.parametrize("sign", [0, 1])
def test_small_order_keys_are_refused(y, sign):
    public = room.ED25519_PUBLIC_PREFIX + (y | sign << 255).to_bytes(32, "little")
    assert not verify(public, b"anything", (1).to_bytes(32, "little") + bytes(32))
    with pytest.raises(ValueError, match="small order"):
        peer_id_of(public)


def test_the_refusal_is_needed():
    """The library accepts the all-identity key for any message, so `verify` may not rely on it alone."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    identity_point = (1).to_bytes(32, "little")
    Ed25519PublicKey.from_public_bytes(identity_point).verify(identity_point + bytes(32), b"anything")
