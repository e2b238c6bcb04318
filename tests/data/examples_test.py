"""`tf.train.Example`: bytes as protocol buffers write them."""

import pytest

from scar_jax.data.examples import parse_example, write_example


def test_round_trip():
  features = {'a': [b'x', b''], 'b': [0, 1, -1, 2**63 - 1, -(2**63)], 'c': []}
  assert parse_example(write_example(features)) == features


def test_bytes_of_the_reference():
  # As TensorFlow serialises {'i': [300], 'f': [0.5, -2], 's': [b'hi']}: lists
  # of numbers packed.
  packed = bytes.fromhex(
    '0a2d 0a0b 0a0169 1206 1a04 0a02ac02'
    '0a11 0a0166 120c 120a 0a080000003f000000c0'
    '0a0b 0a0173 1206 0a04 0a026869'
  )
  found = parse_example(packed)
  assert found == {'i': [300], 'f': [0.5, -2.0], 's': [b'hi']}
  # Not packed, as other writers do; and a feature without a value.
  loose = bytes.fromhex('0a0d0a0b0a016912061a0408010802')
  assert parse_example(loose) == {'i': [1, 2]}
  assert parse_example(bytes.fromhex('0a050a030a0161')) == {'a': []}


@pytest.mark.parametrize(
  'content', [b'not an example', b'\x0a\xff', b'\x0a\x05\x0a', b'\x0b']
)
def test_what_is_no_example(content):
  with pytest.raises(ValueError, match=r'not a serialized tf\.train\.Example'):
    parse_example(content)
