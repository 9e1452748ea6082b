import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from fl.errors import ShoalError
from privacy.secure_aggregation.primitives import add_mask, agree, decrypt, derive, encrypt, pack, public_key, unpack

A, B = bytes(range(32)), bytes(range(1, 33))


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("length", [0, 1, 5, 2**16, 2**16 + 3, 200_001])
def test_a_mask_is_the_cipher_stream_and_is_taken_off_again(dtype, length):
    vector = np.arange(length).astype(dtype)
    masked = vector.copy()
    add_mask(masked, A)
    stream = Cipher(algorithms.AES(A), modes.CTR(bytes(16))).encryptor().update(bytes(vector.nbytes))
    assert (masked - vector).tobytes() == stream
    add_mask(masked, A, -1)
    assert masked.tobytes() == vector.tobytes()


def test_both_sides_agree_and_uses_differ():
    left, right = (X25519PrivateKey.from_private_bytes(k) for k in (A, B))
    key = agree(left, public_key(B), "use", 1, 2)
    assert key == agree(right, public_key(A), "use", 1, 2)
    assert key != agree(left, public_key(B), "use", 2, 1)
    assert derive(A, "x", 1) != derive(A, "x", "1") != derive(B, "x", "1")


def test_a_public_key_of_small_order_is_refused():
    with pytest.raises(ShoalError, match="public key can't be used"):
        agree(X25519PrivateKey.from_private_bytes(A), bytes(32), "use")


def test_encryption_is_authenticated():
    box = encrypt(A, bytes(12), b"text")
    assert decrypt(A, box) == b"text"
    for key, message in [(B, box), (A, box[:-1]), (A, b"\1" + box[1:]), (A, b"")]:
        with pytest.raises(ShoalError, match="altered"):
            decrypt(key, message)


@given(st.dictionaries(st.integers(0, 2**32 - 1), st.binary(max_size=40), max_size=8))
def test_messages_round_trip(parts):
    message = pack(parts)
    assert unpack(message) == parts
    if message:
        with pytest.raises(ShoalError):
            unpack(message[:-1])
        with pytest.raises(ShoalError):
            unpack(message + message)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_in_one_way_or_refused(message):
    try:
        parts = unpack(message)
    except ShoalError:
        return
    assert pack(parts) == message


def test_parts_have_the_size_that_is_asked_for():
    assert unpack(pack({3: b"ab"}), 2) == {3: b"ab"}
    with pytest.raises(ShoalError, match="bad part for client 3"):
        unpack(pack({3: b"ab"}), 3)
