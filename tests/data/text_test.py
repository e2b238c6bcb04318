"""Case C12: prompts of every kind, for the byte and the T5 vocabulary."""

import dataclasses
import json
import logging
import pickle

import numpy as np
import pytest

from scar_jax.data.cleaning import clean_caption
from scar_jax.data.records import RecordError
from scar_jax.data.text import ByteText, T5Text, make_text


@pytest.fixture(scope='module')
def prompts(case):
  lines = case('c12_prompts.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert len(rows) == 17
  return {row['id']: row['prompt'] for row in rows}


@pytest.fixture(scope='module')
def spiece(tmp_path_factory):
  """A small vocabulary with T5's special ids."""
  sentencepiece = pytest.importorskip('sentencepiece')
  folder = tmp_path_factory.mktemp('t5')
  words = 'a red bicycle leaning on the wall make dog wear hat add sign one'
  corpus = [
    f'{a} {b} {c}'
    for a in words.split()
    for b in words.split()
    for c in ('cafe', 'line', 'put')
  ]
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(corpus),
    model_prefix=str(folder / 'spiece'),
    vocab_size=80,
    hard_vocab_limit=False,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
  )
  return folder


@pytest.fixture(params=['byte', 't5'])
def text(request):
  if request.param == 'byte':
    return ByteText(77)
  return T5Text(request.getfixturevalue('spiece'), 77)


def test_c12_empty_and_blank_are_the_null_condition(text, prompts):
  for name in ('empty', 'spaces', 'none'):
    ids, mask = text.encode(prompts[name])
    assert not ids.any()
    assert not mask.any()
    assert ids.dtype == np.int32
    assert ids.shape == mask.shape == (77,)


def test_c12_long_is_cut_with_one_warning(text, prompts, caplog):
  with caplog.at_level(logging.WARNING):
    for _ in range(3):
      ids, mask = text.encode(prompts['long'], 'row long')
  assert mask.all()
  assert ids[-1] == 1
  assert (ids != 1).sum() == 76
  assert text.cut == 3
  (message,) = [r.getMessage() for r in caplog.records if 'cut' in r.msg]
  found = len(text._tokens(prompts['long'].strip())) + 1
  assert f'row long: text of {found} tokens is cut' in message
  assert 'text.length=77' in message


@pytest.mark.parametrize('name', ['number', 'list'])
def test_c12_other_types_are_refused_by_row(text, prompts, name):
  kind = {'number': 'int 42', 'list': 'list'}[name]
  with pytest.raises(RecordError, match=f'row {name}: .*must be a.*{kind}'):
    text.encode(prompts[name], f'row {name}')


def test_c12_nul_and_half_surrogates_are_refused_by_row(text, prompts):
  with pytest.raises(RecordError, match=r'row nul: .*NUL.*position 9'):
    text.encode(prompts['nul'], 'row nul')
  with pytest.raises(RecordError, match='half a surrogate pair at position 2'):
    text.encode('é \ud83d')
  # The case's row holds a backslash and letters, which is plain text.
  assert text.encode(prompts['lone_surrogate_escaped'])[1].any()


def test_c12_both_accent_forms_give_the_same_ids(text, prompts):
  assert prompts['combining'] != prompts['combining_nfc']
  a, b = (text.encode(prompts[n])[0] for n in ('combining', 'combining_nfc'))
  assert (a == b).all()
  assert a.any()


@pytest.mark.parametrize(
  'name', ['emoji', 'zh', 'rtl', 'brackets', 'html', 'curly', 'newline']
)
def test_c12_all_scripts_pass(text, prompts, name):
  ids, mask = text.encode(prompts[name])
  n = mask.sum()
  assert mask[:n].all()
  assert ids[n - 1] == 1
  assert (ids < text.vocab).all()
  if isinstance(text, ByteText):
    assert text.decode(ids) == prompts[name]


def test_c12_unknown_tokens_are_reported_over_a_threshold(
  spiece, prompts, caplog
):
  text = T5Text(spiece, 77)
  with caplog.at_level(logging.WARNING):
    text.encode('a red dog')
    assert text.unknown == 0
    for name in ('zh', 'rtl', 'emoji'):
      text.encode(prompts[name], name)
  assert text.unknown >= 2
  messages = [r.getMessage() for r in caplog.records]
  assert len([m for m in messages if 'unknown' in m]) == 1
  assert any(m.startswith('zh: ') and '% of the tokens' in m for m in messages)


def test_byte_ids_are_bytes_plus_three():
  ids, mask = ByteText(6).encode('ab')
  assert ids.tolist() == [100, 101, 1, 0, 0, 0]
  assert mask.tolist() == [True] * 3 + [False] * 3
  ids, mask = ByteText(6, pad='left').encode('ab')
  assert ids.tolist() == [0, 0, 0, 100, 101, 1]
  assert mask.tolist() == [False] * 3 + [True] * 3


def test_bytes_are_not_cut_inside_a_character():
  ids, mask = ByteText(5).encode('aé雪')  # 1 + 2 + 3 bytes
  assert ByteText(5).decode(ids) == 'aé'
  assert mask.sum() == 4


def test_t5_ids_are_those_of_the_model(spiece):
  import sentencepiece

  model = sentencepiece.SentencePieceProcessor(
    model_file=str(spiece / 'spiece.model')
  )
  text = T5Text(spiece / 'spiece.model', 40)
  ids, mask = text.encode('  make the dog wear a hat ')
  wanted = [*model.encode('make the dog wear a hat'), 1]
  assert ids[mask].tolist() == wanted
  again = pickle.loads(pickle.dumps(text))
  assert (again.encode('make the dog wear a hat')[0] == ids).all()


@dataclasses.dataclass
class Section:
  kind: str = 'byte'
  length: int = 8
  vocab: str = ''
  pad: str = 'right'
  clean: bool = False


def test_errors_of_the_settings(tmp_path):
  assert make_text(Section(pad='left')).encode('a')[1][-1]
  for section, reason in (
    (Section(kind='clip'), "text.kind='clip'; accepted: byte, t5"),
    (Section(pad='both'), "text.pad='both'; accepted: right, left"),
    (Section(length=1), 'text.length=1; accepted: 2 or more'),
    (Section(kind='t5', vocab='no/where'), "'no/where' does not exist"),
    (Section(kind='t5', vocab=str(tmp_path)), r'holds none of spiece.model'),
  ):
    with pytest.raises(ValueError, match=reason):
      make_text(section)


def test_a_vocabulary_of_another_family_is_refused(tmp_path):
  sentencepiece = pytest.importorskip('sentencepiece')
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['abcd efgh', 'ijkl mnop'] * 9),
    model_prefix=str(tmp_path / 'spiece'),
    vocab_size=20,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  with pytest.raises(ValueError, match=r'a T5 vocabulary has \[0, 1, 2\]'):
    T5Text(tmp_path, 8)
  (tmp_path / 'spiece.model').write_bytes(b'cut')
  with pytest.raises(ValueError, match=r'spiece\.model.*cannot be read'):
    T5Text(tmp_path, 8)


def test_cleaning_is_off_unless_asked():
  raw = 'Red <b>car</b> &amp; SKY — https://a.b/c img_01.jpg 640x480'
  assert clean_caption(raw) == 'red car & sky'
  plain, clean = ByteText(80), ByteText(80, clean=True)
  assert plain.decode(plain.encode(raw)[0]) == raw
  assert clean.decode(clean.encode(raw)[0]) == 'red car & sky'
  assert not clean.encode('雪山')[1].any()
