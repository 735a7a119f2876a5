import contextlib
import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dsv3_jax.config import ConfigError, Data
from dsv3_jax.data import loader, pipeline, shards, units
from dsv3_jax.data.tokenizer import NewlineSplit

BASE = Data(sequence_length=31, batch_size=4, workers=0, prefetch=0, fim_rate=0.3, split_rate=0.3,
            validation_fraction=0.2, seed=3)


@pytest.fixture(scope="session")
def workdir(tmp_path_factory, tokenizer, folder):
  """A workdir with its tokenizer, where all tests share the shards."""
  path = tmp_path_factory.mktemp("workdir")
  (path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
  return str(path)


@pytest.fixture(scope="session")
def corpus(workdir, folder):
  """A function: changes of BASE -> Corpus."""
  def make(**changes):
    data = dataclasses.replace(BASE, sources=(str(folder),))
    return pipeline.prepare(dataclasses.replace(data, **changes), 420, workdir)
  return make


def take(iterator, n):
  return list(itertools.islice(iterator, n))


def assert_equal(batches, others):
  assert len(batches) == len(others)
  for a, b in zip(batches, others, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      assert a[key].dtype == np.int32
      np.testing.assert_array_equal(a[key], b[key])


def constant(step):
  return 4


def streams(batches):
  """The stream of each row: rows of consecutive micro-batches, their shared token once."""
  rows = np.concatenate([b["tokens"] for b in batches])  # [steps * A, B, S]
  return [np.concatenate([rows[0, j, :1], rows[:, j, 1:].ravel()]).tolist()
          for j in range(rows.shape[1])]


def split_documents(stream, tokenizer):
  """Whole documents of a stream, by bos; the last, unfinished one is left out."""
  starts = [i for i, t in enumerate(stream) if t == tokenizer.bos]
  return [stream[a:b] for a, b in itertools.pairwise(starts)]


def plain(document, tokenizer):
  """Text of a packed document, whether rearranged or not."""
  assert document[0] == tokenizer.bos and document[-1] == tokenizer.eos
  body = document[1:-1]
  if body[0] == tokenizer.fim_begin:
    hole, end = body.index(tokenizer.fim_hole), body.index(tokenizer.fim_end)
    body = body[1:hole] + body[end + 1:] + body[hole + 1:end]
  return tokenizer.decode(body)


def training_texts(corpus_, texts, fraction):
  limit = fraction * 2**64
  return [t for t in texts if shards.content_hash(t.encode()) >= limit]


def test_an_epoch_holds_each_training_document_once_and_no_token_is_lost(corpus, texts, tokenizer):
  """Oracle: the texts that were written to disk, split by their hash."""
  made = corpus(sequence_length=256)  # so long that no document is cut
  wanted = training_texts(made, texts, 0.2)
  batches = take(made.train_iterator(constant), 190)
  per_lane = [split_documents(s, tokenizer) for s in streams(batches)]
  assert len(wanted) >= units.FEWEST
  assert all(len(lane) > 2 * len(wanted) / 4 + 1 for lane in per_lane)
  order = [plain(per_lane[i % 4][i // 4], tokenizer) for i in range(2 * len(wanted))]
  first, second = order[:len(wanted)], order[len(wanted):]
  assert sorted(first) == sorted(second) == sorted(wanted)
  assert first != second and first != wanted


def test_rates_of_rearranged_documents_and_cut_tokens(corpus, tokenizer):
  """Oracle: binomial law at the configured rate (4 standard deviations); rate 0 gives none."""
  documents = [d for s in streams(take(corpus(sequence_length=256).train_iterator(constant), 190))
               for d in split_documents(s, tokenizer)]
  share = np.mean([d[1] == tokenizer.fim_begin for d in documents])
  assert len(documents) > 200 and abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / len(documents))

  fused = list(NewlineSplit(tokenizer).parts)

  def share_of_fused(rate):
    made = corpus(fim_rate=0.0, split_rate=rate)
    batches = take(made.train_iterator(constant), 400)
    lanes = [split_documents(s, tokenizer) for s in streams(batches)]
    count, size = np.zeros(2), 0
    for d in (lanes[i % 4][i // 4] for i in range(40)):  # the same documents at every rate
      assert tokenizer.fim_begin not in d
      count += np.isin(d, fused).sum(), 1
      size += len(tokenizer.decode_bytes(d))
    return count[0], size

  (whole, size), (left, same_size) = share_of_fused(0.0), share_of_fused(0.3)
  assert size == same_size and whole > 1000
  assert abs(left / whole - 0.7) < 4 * np.sqrt(0.3 * 0.7 / whole)


def test_a_row_leaves_a_document_after_four_sequences(corpus, texts, tokenizer):
  """Law: an epoch of cut documents holds every token once, in units of at most four sequences."""
  made = corpus(fim_rate=0.0, split_rate=0.0)
  T = made.train_iterator(constant)._recipe.data.sequence_length
  documents = loader.Documents(made.train_iterator(constant)._recipe)
  count = len(documents._units)
  parts = [documents.tokens(i % 4, (i // 4,)).tolist() for i in range(count)]
  wanted = training_texts(made, texts, 0.2)
  assert count > 2 * len(wanted) and max(map(len, parts)) <= units.SEQUENCES * T + 2
  special = (tokenizer.bos, tokenizer.eos)
  got = sorted(t for part in parts for t in part if t not in special)
  assert got == sorted(t for text in wanted for t in tokenizer.encode(text))
  assert sum(part.count(tokenizer.bos) for part in parts) == len(wanted)


@pytest.mark.parametrize("isolate", [False, True])
def test_restart_gives_the_exact_next_batch_at_random_positions(corpus, isolate, folder):
  """Oracle: the iterator that was never interrupted; states pass through JSON text."""
  made = corpus(isolate=isolate, sources=(str(folder), str(folder / "00*.txt")),
                weights=(3.0, 1.0), prefetch=2)
  running, batches, states = made.train_iterator(constant), [], []
  for _ in range(120):
    states.append(json.dumps(running.get_state()))
    batches.append(next(running))
  running.close()
  for at in [0, *random.Random(5).sample(range(1, 115), 6)]:
    fresh = made.train_iterator(constant)
    take(fresh, at % 3)  # a state may be set on an iterator in use
    fresh.set_state(states[at])
    assert fresh.get_state() == json.loads(states[at])
    assert_equal(take(fresh, 5), batches[at:at + 5])
    fresh.close()


def test_batches_do_not_depend_on_workers_and_prefetch(corpus):
  """Oracle: the pipeline without workers; worker processes are real, and restart in them too."""
  inline = corpus(isolate=True).train_iterator(constant)
  first, state, rest = take(inline, 10), inline.get_state(), take(inline, 20)
  with contextlib.closing(corpus(isolate=True, prefetch=4).train_iterator(constant)) as threaded:
    assert_equal(take(threaded, 30), first + rest)
    threaded.set_state(state)  # while the thread is ahead
    assert_equal(take(threaded, 20), rest)
  data = dict(isolate=True, workers=2, prefetch=3)
  with contextlib.closing(corpus(**data).train_iterator(constant)) as processes:
    processes.set_state(state)
    assert_equal(take(processes, 20), rest)


@pytest.mark.timeout(60)
def test_workers_outlive_signals_and_not_their_parent(corpus, workdir):
  """Oracle: the processes themselves, after a terminal's and a batch system's signals to the whole
  group, and after SIGKILL to the parent alone."""
  made = corpus(workers=2, prefetch=1)
  with open(os.path.join(workdir, "feeding.json"), "w") as f:
    json.dump(dataclasses.asdict(made._data), f)
  parent = subprocess.Popen([sys.executable, "-m", "tests.data.feeding", workdir], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
  try:
    assert parent.stdout.readline() == "ready\n"
    os.killpg(parent.pid, signal.SIGINT)
    os.killpg(parent.pid, signal.SIGTERM)
    parent.stdin.write("go on\n")
    parent.stdin.flush()
    done, *workers = parent.stdout.readline().split()
    assert done == "done" and len(workers) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(map(_alive, workers)):
      assert time.monotonic() < deadline, "a worker goes on without its parent"
      time.sleep(0.05)
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(parent.pid, signal.SIGKILL)


def _alive(pid: str) -> bool:
  """Whether a process runs; one that nobody waited for (a zombie) does not."""
  try:
    with open(f"/proc/{pid}/stat") as f:
      return f.read().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


def test_processes_share_the_rows_and_restart_in_another_number(corpus):
  """Oracle: one process; the union of two or four is its batch, before and after a restart."""
  made = corpus()
  whole = take(made.train_iterator(constant), 30)

  def run(count, n, state=None):
    parts, states = [], []
    for index in range(count):
      iterator = made.train_iterator(constant, range(index * 4 // count, (index + 1) * 4 // count))
      if state is not None:
        iterator.set_state(state)
      parts.append(take(iterator, n))
      states.append(iterator.get_state())
    joined = [{"tokens": np.concatenate([b["tokens"] for b in bs], axis=1)}
              for bs in zip(*parts, strict=True)]
    return joined, loader.merge_states(states)

  first, state = run(2, 10)
  second, state = run(4, 10, state)
  third, _ = run(1, 10, state)
  assert_equal(first + second + third, whole)
  lonely, other = made.train_iterator(constant, [0, 1]), made.train_iterator(constant, [1, 2, 3])
  for some in (lonely, other):
    next(some)
  shared = loader.merge_states([other.get_state(), lonely.get_state()])
  alone = made.train_iterator(constant)
  next(alone)
  assert shared == alone.get_state() and list(shared["lanes"]) == list("0123")
  with pytest.raises(ValueError, match=r"lacks the rows \[2, 3\]"):
    made.train_iterator(constant).set_state(lonely.get_state())


def test_a_growing_batch_takes_more_micro_batches_of_the_same_stream(corpus):
  """Oracle: the stream cut into micro-batches of constant number."""
  made = corpus(batch_size=8, microbatch=2, batch_start=4)
  steady = np.concatenate([b["tokens"] for b in take(made.train_iterator(lambda _: 2), 20)])
  ramp = take(made.train_iterator(lambda step: 4 + 2 * min(step // 2, 2)), 7)
  assert [b["tokens"].shape for b in ramp] == [
      (a, 2, 32) for a in (2, 2, 3, 3, 4, 4, 4)]
  np.testing.assert_array_equal(np.concatenate([b["tokens"] for b in ramp])[:20], steady)
  with pytest.raises(ValueError, match="step 0 wants 3 sequences"):
    next(made.train_iterator(lambda _: 3))


def test_seeds_and_epochs_differ_and_equal_seeds_agree(corpus, texts, tokenizer):
  """Oracle: a second iterator; other seeds give other orders, and another epoch rearranges other
  documents of the same texts."""
  a, b, c = (take(corpus(seed=s).train_iterator(constant), 50) for s in (3, 3, 4))
  assert_equal(a, b)
  assert any((x["tokens"] != y["tokens"]).any() for x, y in zip(a[:2], c[:2], strict=True))
  n = len(training_texts(None, texts, 0.2))
  lanes = [split_documents(s, tokenizer)
           for s in streams(take(corpus(sequence_length=256).train_iterator(constant), 190))]
  order = [lanes[i % 4][i // 4] for i in range(2 * n)]
  first, second = ({plain(d, tokenizer): d[1] == tokenizer.fim_begin for d in epoch}
                   for epoch in (order[:n], order[n:]))
  assert first.keys() == second.keys() and len(first) == n
  assert sum(first.values()) > 0 < sum(second.values()) and first != second


def test_weights_are_shares_of_tokens(tokenizer, tmp_path):
  """Oracle: counts of two alphabets; the sources' documents differ tenfold in length."""
  for name, text, n in (("a", "alpha beta ", 20), ("b", "ж", 900)):
    (tmp_path / name).mkdir()
    for i in range(40):
      (tmp_path / name / f"{i}.txt").write_text(f"{text * n}{i}", encoding="utf-8")
  (tmp_path / "w").mkdir()
  (tmp_path / "w" / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
  data = dataclasses.replace(BASE, sources=(str(tmp_path / "a"), str(tmp_path / "b")),
                             weights=(3.0, 1.0), fim_rate=0.0, split_rate=0.0)
  made = pipeline.prepare(data, 420, str(tmp_path / "w"))
  tokens = np.concatenate([b["tokens"].ravel() for b in take(made.train_iterator(constant), 3000)])
  cyrillic = np.isin(tokens, np.unique(tokenizer.encode("ж" * 900))).mean()
  assert abs(cyrillic - 0.25) < 0.04


@pytest.mark.parametrize("isolate", [False, True])
def test_validation_is_fixed_whole_and_unseen_in_training(
    corpus, texts, tokenizer, isolate, folder):
  """Oracle: the texts whose hash falls below the fraction; each token is a target once."""
  made = corpus(isolate=isolate)
  held = sorted((t for t in texts if shards.content_hash(t.encode()) < 0.2 * 2**64),
                key=lambda t: shards.content_hash(t.encode()))
  stream = [x for t in held for x in [tokenizer.bos, *tokenizer.encode(t), tokenizer.eos]]
  batches = made.validation_batches(4)
  targets = np.concatenate([b["tokens"][b["mask"] == 1] for b in batches])
  wanted = [t for t in stream if t != tokenizer.bos] if isolate else stream[1:]
  assert targets.tolist() == wanted
  for b in batches:
    assert b["tokens"].shape == b["mask"].shape == (4, 32) and b["mask"].dtype == np.int8
    assert not b["mask"][:, 0].any()
    assert ("segments" in b) == isolate == ("valid" not in b)
    text = b["segments"] >= 0 if isolate else b["valid"] == 1
    assert (text == (b["tokens"] != tokenizer.pad)).all()
  assert made.validation_text() == "".join(held).encode()
  assert made.validation_text(100) == "".join(held).encode()[:100]
  assert_dicts = zip(made.validation_batches(4, limit=2), batches[:2], strict=True)
  assert all((a[k] == b[k]).all() for a, b in assert_dicts for k in a)
  reordered = corpus(isolate=isolate, seed=9, fim_rate=0.0, sources=(
      str(folder / "*[13579].txt"), str(folder / "*[02468].txt")))
  again = reordered.validation_batches(4)
  assert all((a[k] == b[k]).all() for a, b in zip(batches, again, strict=True) for k in a)


def test_a_single_file_is_shuffled_and_partly_held_out(tmp_path, tokenizer):
  """Oracle: the file itself: parts held out and parts trained on make it up; a note says so."""
  lines = [f"line {i} of one file\n" for i in range(4000)]
  (tmp_path / "one.txt").write_text("".join(lines))
  data = dataclasses.replace(BASE, sources=(str(tmp_path / "one.txt"),), fim_rate=0.0,
                             validation_fraction=0.05, isolate=False)
  made = pipeline.prepare(data, 300, str(tmp_path / "w"))
  held, total = (made.summary[k] for k in ("validation_tokens", "tokens"))
  assert made.describe() == (
      f"1 documents, {total:,} tokens, {held:,} of them held out; too few documents to hold some "
      "out: parts of documents are held out")
  held = made.validation_text().decode()
  assert 0.01 < len(held) / len("".join(lines)) < 0.15
  batch = next(made.train_iterator(constant))["tokens"][0]
  assert len({tuple(row) for row in batch.tolist()}) == 4
  trained = made.tokenizer.decode(np.concatenate(
      [b["tokens"].ravel() for b in take(made.train_iterator(constant), 500)]))
  inner = [x for x in held.splitlines()[1:-1] if x.startswith("line") and x.endswith("file")]
  assert len(inner) > 20 and sum(f"\n{x}\n" in trained for x in inner) < 0.1 * len(inner)


def test_prepared_data_are_used_again_until_something_changes(tmp_path, texts):
  """Oracle: modification times and names under workdir/data."""
  source = tmp_path / "text"
  source.mkdir()
  for i, text in enumerate(texts):
    (source / f"{i}.txt").write_text(text, encoding="utf-8")
  data, work = dataclasses.replace(BASE, sources=(str(source),)), tmp_path / "w"
  stages = []
  first = pipeline.prepare(data, 400, str(work), lambda stage, done, total: stages.append(stage))
  assert set(stages) == {"training the tokenizer", "tokenizing"}
  made, = os.listdir(work / "data")
  before = (work / "data" / made).stat().st_mtime_ns
  second = pipeline.prepare(data, 400, str(work), lambda *_: pytest.fail("worked again"))
  assert (work / "data" / made).stat().st_mtime_ns == before
  assert first.fingerprint == second.fingerprint
  (source / "0.txt").write_text("something else\n" * 50)
  third = pipeline.prepare(data, 400, str(work))
  assert len(os.listdir(work / "data")) == 2 and third.tokenizer.hash == first.tokenizer.hash
  with pytest.raises(ValueError, match="files of data.sources or the tokenizer changed"):
    third.train_iterator(constant).set_state(first.train_iterator(constant).get_state())


def test_tokenized_shards_are_a_source(corpus, workdir, folder, tmp_path):
  """Oracle: the same corpus read from text."""
  made = corpus()
  ready, = made.folders
  other = pipeline.prepare(dataclasses.replace(BASE, sources=(f"shards:{ready}",)), 420,
                           str(tmp_path / "w"))
  assert other.tokenizer.hash == made.tokenizer.hash
  assert_equal(take(other.train_iterator(constant), 20), take(made.train_iterator(constant), 20))
  with pytest.raises(ConfigError, match="420 tokens, but model.vocab_size=300"):
    pipeline.prepare(dataclasses.replace(BASE, sources=(f"shards:{ready}",)), 300,
                     str(tmp_path / "w2"))


def test_bad_input_ends_in_one_clear_error(corpus, folder, tmp_path, tokenizer):
  """Oracle: the messages a user needs, each naming the key and the fix."""
  short = tmp_path / "short.txt"
  short.write_text("a few words")
  data = dataclasses.replace(BASE, sources=(str(short),))
  with pytest.raises(ConfigError, match="less than one sequence .*lower data.sequence_length"):
    pipeline.prepare(data, 300, str(tmp_path / "w"))
  blocked = tmp_path / "file"
  blocked.touch()
  with pytest.raises(ConfigError, match="workdir .* cannot be written"):
    pipeline.prepare(dataclasses.replace(BASE, sources=(str(folder),)), 420,
                     str(blocked / "w"))
  with pytest.raises(ConfigError, match="does not exist"):
    pipeline.prepare(dataclasses.replace(BASE, sources=(str(folder), "absent")), 420,
                     str(tmp_path / "untouched"))
  assert not (tmp_path / "untouched").exists()
  mine = tmp_path / "mine.json"
  mine.write_text(tokenizer.to_json(), encoding="utf-8")
  work = str(tmp_path / "w3")
  pipeline.prepare(dataclasses.replace(BASE, sources=(str(folder),)), 300, work)
  with pytest.raises(ConfigError, match="differs from data.tokenizer"):
    pipeline.prepare(dataclasses.replace(BASE, sources=(str(folder),), tokenizer=str(mine)), 420,
                     work)
  state = corpus().train_iterator(constant).get_state()
  with pytest.raises(ValueError, match="micro-batch has 4 sequences, this run's 2; set data.micro"):
    corpus(microbatch=2).train_iterator(constant).set_state(state)


def test_what_was_trained_on(corpus, texts):
  """Oracle: the validation text itself."""
  made = corpus()
  hashes = np.array([shards.content_hash(t.encode()) for t in texts], np.uint64)
  seen = made.trained_on(hashes)
  text = made.validation_text().decode()
  assert [t in text for t in texts] == (~seen).tolist() and 0 < seen.sum() < len(texts)
  assert not made.trained_on(np.array([12345], np.uint64))[0]
