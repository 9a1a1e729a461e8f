"""Changes to a serialized SentencePiece model, without the protobuf package.

A protobuf message may be extended by appending bytes: repeated fields grow, and where a sub-message is given again, its
fields overwrite the first ones (protobuf encoding guide, "Last One Wins" and "Message Structure"). That is
all we need: new pieces at the end of the vocabulary, and two switches of the normalizer. The field numbers are
those of sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

_PIECES, _NORMALIZER_SPEC = 1, 3  # ModelProto
_PIECE, _SCORE, _TYPE = 1, 2, 3  # ModelProto.SentencePiece
_ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES = 3, 4  # NormalizerSpec
_USER_DEFINED = 4  # ModelProto.SentencePiece.Type
_VARINT, _LENGTH_DELIMITED, _FIXED32 = 0, 2, 5  # wire types


def add_user_defined_symbols(model_proto: bytes, symbols: Sequence[str]) -> bytes:
    """Append pieces that are always cut out of the text whole, blanks around them untouched.

    Args:
        model_proto: a serialized sentencepiece ModelProto.
        symbols: texts of the new pieces, which get the ids after the present vocabulary, in this order.
    """
    for symbol in symbols:
        piece = _field(_PIECE, symbol.encode()) + _key(_SCORE, _FIXED32) + struct.pack("<f", 0.0)
        piece += _key(_TYPE, _VARINT) + _varint(_USER_DEFINED)
        model_proto += _field(_PIECES, piece)
    return model_proto


def keep_blanks(model_proto: bytes) -> bytes:
    """Switch off the blank that is put before every text and the removal of double blanks.

    Prompt and response are tokenized apart, so a blank invented at the start of a response would separate it from
    the prompt by a token that nobody wrote, and a removed blank could not be decoded again.
    """
    switches = _key(_ADD_DUMMY_PREFIX, _VARINT) + _varint(0)
    switches += _key(_REMOVE_EXTRA_WHITESPACES, _VARINT) + _varint(0)
    return model_proto + _field(_NORMALIZER_SPEC, switches)


def _field(number: int, payload: bytes) -> bytes:
    return _key(number, _LENGTH_DELIMITED) + _varint(len(payload)) + payload


def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
