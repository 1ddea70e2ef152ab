"""The feature index, against planted activations and ten lines of dense torch: counts, histograms, contexts, draws, resuming, refusing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import feature_cases
import pytest
import torch

import glasshouse
from glasshouse.errors import BadValue, EmptyCorpus, UnknownKnob
from glasshouse.features import Block, gather, open_index
from glasshouse.features.accumulate import ALIKE, Smallest, priority
from glasshouse.features.gathering import fingerprint, word_list


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> glasshouse.features.FeatureIndex:  # type: ignore[name-defined]
    return feature_cases.planted_index(tmp_path_factory.mktemp("features") / "index")


def dense_top(feature: int, most: int) -> list[int]:
    """The strongest token of every window, equal tails once, by brute force."""
    ids, x, lengths = feature_cases.planted()
    best: dict[tuple[int, ...], tuple[float, int]] = {}
    start = 0
    for length in lengths.tolist():
        values = x[start : start + length, feature]
        place = int(values.argmax())
        if values[place] > 0:
            tail = tuple(ids[max(start, start + place - ALIKE + 1) : start + place + 1].tolist())
            if tail not in best or float(values[place]) > best[tail][0]:
                best[tail] = (float(values[place]), start + place)
        start += length
    return [token for _, token in sorted(best.values(), key=lambda pair: (-pair[0], pair[1]))[:most]]


def test_counts_and_sums_are_those_of_dense_activations(index: Any) -> None:
    _, x, _ = feature_cases.planted()
    assert torch.equal(index.count, (x > 0).sum(0))
    assert torch.equal(index.peak, x.amax(0))
    torch.testing.assert_close(index.tensors["total"], x.double().sum(0))
    torch.testing.assert_close(index.density, (x > 0).double().mean(0))
    torch.testing.assert_close(index.mean[1:], (x.double().sum(0) / (x > 0).sum(0))[1:])
    assert index.sparsity == pytest.approx(float((x > 0).sum()) / len(x))
    assert not index.alive[0]
    assert int(index.alive.sum()) == feature_cases.WIDTH - 1
    assert index.tokens == len(x)


def test_the_histogram_is_that_of_numpy(index: Any) -> None:
    import numpy as np

    _, x, _ = feature_cases.planted()
    for feature in range(1, feature_cases.WIDTH):
        values = x[:, feature][x[:, feature] > 0].double().numpy()
        edges, counts = index.histogram(feature)
        assert counts == np.histogram(values, bins=len(counts), range=(0.0, values.max()))[0].tolist()
        assert edges[0] == 0
        assert edges[-1] == pytest.approx(values.max())
    assert index.histogram(0) == ([], [])


def test_top_contexts_are_the_strongest_one_a_window(index: Any) -> None:
    _, x, _ = feature_cases.planted()
    for feature in range(feature_cases.WIDTH):
        top = index.top(feature)
        assert [context.token for context in top] == dense_top(feature, 20)
        assert [context.value for context in top] == [float(x[context.token, feature]) for context in top]


def test_contexts_hold_their_surroundings_and_stay_within_their_window(index: Any) -> None:
    ids, x, lengths = feature_cases.planted()
    window = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    for feature in range(1, feature_cases.WIDTH):
        for context in index.contexts(feature):
            start, end = context.token - context.at, context.token - context.at + len(context.ids)
            assert context.ids == tuple(ids[start:end].tolist())
            assert context.values == tuple(x[start:end, feature].tolist())
            assert set(window[start:end].tolist()) == {context.window}
            assert context.at == min(20, int((window[: context.token] == context.window).sum()))
            assert end == len(window) or window[end] != context.window or end - context.token == 11


def test_equal_texts_come_once(tmp_path: Path) -> None:
    ids = torch.arange(6).repeat(30)
    x = torch.zeros(180, 3)
    x[4::6, 1] = torch.linspace(1, 2, 30)
    made = gather(feature_cases.plain_dictionary(3), None, None, [Block(ids, x, torch.full((30,), 6))], tokens=None, folder=tmp_path / "i")
    assert [context.token for context in made.top(1)] == [29 * 6 + 4]
    assert made.top(1)[0].value == 2.0


def test_draws_come_from_their_level_and_are_complete_where_few(index: Any) -> None:
    _, x, _ = feature_cases.planted()
    for feature in range(1, feature_cases.WIDTH):
        levels = index.draws(feature)
        assert len(levels) == 10
        assert sum(level.n for level in levels) == int((x[:, feature] > 0).sum())
        for place, level in enumerate(levels):
            values = [context.value for context in level.contexts]
            assert len(values) == min(5, level.n)
            assert len({context.token for context in level.contexts}) == len(values)
            assert all(level.low <= value < level.high or (place == 9 and value == level.high) for value in values)
    assert index.draws(0) == []


def test_draws_are_uniform() -> None:
    drawn = torch.zeros(20)
    for seed in range(600):
        kept = Smallest(1, 3)
        for part in torch.arange(20).split(7):
            kept.add(torch.zeros(len(part), dtype=torch.long), priority(seed, part, 4), part)
        drawn[kept.token[0]] += 1
    assert drawn.sum() == 1800
    assert float(((drawn - 90) ** 2 / 90).sum()) < 36.2  # the chi-squared bound of p = .01 at 19 degrees of freedom


def test_priorities_are_spread_and_independent() -> None:
    first = priority(0, torch.arange(100_000), 3)
    other = priority(0, torch.arange(100_000), 4)
    again = priority(1, torch.arange(100_000), 3)
    assert float(first.min()) >= 0
    assert float(first.max()) < 1
    counts = first.histc(bins=10, min=0, max=1)
    assert bool(((counts - 10_000).abs() < 400).all())
    for one in (other, again, torch.roll(first, 1)):
        assert abs(float(torch.corrcoef(torch.stack([first, one]))[0, 1])) < 0.012


@pytest.mark.parametrize("cuts", [1, 2, 7])
def test_it_does_not_matter_where_blocks_are_cut(index: Any, tmp_path: Path, cuts: int) -> None:
    made = feature_cases.planted_index(tmp_path / "index", cuts)
    assert set(made.tensors) == set(index.tensors)
    for name, tensor in index.tensors.items():
        if tensor.dtype == torch.float64:
            torch.testing.assert_close(made.tensors[name], tensor)
        else:
            assert torch.equal(made.tensors[name], tensor), name


def test_the_random_sample_holds_all_codes_of_its_windows(tmp_path: Path) -> None:
    _, x, lengths = feature_cases.planted()
    made = feature_cases.planted_index(tmp_path / "index", sample_tokens=500)
    chosen = made.tensors["sample_windows"]
    size = int(lengths[chosen].sum())
    assert 400 < size <= 500
    inside = torch.repeat_interleave(torch.isin(torch.arange(len(lengths)), chosen), lengths)
    for feature in range(feature_cases.WIDTH):
        tokens, values = made.sample(feature)
        assert tokens.tolist() == ((x[:, feature] > 0) & inside).nonzero()[:, 0].tolist()
        assert torch.equal(values, x[tokens, feature])


def counted(dictionary: Any) -> tuple[Any, list[int]]:
    """The dictionary, and the sizes of the batches it was asked to encode."""
    calls: list[int] = []
    encode = dictionary.encode_sparse

    def watched(x: torch.Tensor) -> Any:
        calls.append(len(x))
        return encode(x)

    object.__setattr__(dictionary, "encode_sparse", watched)
    return dictionary, calls


def test_an_interrupted_pass_goes_on_with_the_same_result(index: Any, tmp_path: Path) -> None:
    blocks = feature_cases.as_blocks(*feature_cases.planted(), 3)

    def stops() -> Iterator[Block]:
        yield from blocks[:2]
        raise KeyboardInterrupt

    dictionary, calls = counted(feature_cases.plain_dictionary())
    with pytest.raises(KeyboardInterrupt):
        gather(dictionary, None, "resid.1", stops(), tokens=None, folder=tmp_path)
    assert len(calls) == 2
    with pytest.raises(BadValue, match="interrupted"):
        open_index(tmp_path)
    (tmp_path / "codes-00002.safetensors.part-1").write_text("torn")
    (tmp_path / "codes-00001.safetensors").write_bytes(b"torn")
    made = gather(dictionary, None, "resid.1", iter(blocks), tokens=None, folder=tmp_path)
    assert calls[2:] == [len(blocks[1].token_ids), len(blocks[2].token_ids)]  # the first block's codes were whole
    assert made.fingerprint == index.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "index.safetensors", "words.json"]
    assert gather(dictionary, None, "resid.1", iter(blocks), tokens=None, folder=tmp_path).fingerprint == index.fingerprint
    assert len(calls) == 4  # finished: nothing was encoded again


def test_codes_can_be_kept(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    feature_cases.planted_index(tmp_path, cuts=2, keep_codes=True)
    held = [load_file(tmp_path / f"codes-0000{number}.safetensors") for number in (0, 1)]
    _, x, _ = feature_cases.planted()
    assert sum(len(part["value"]) for part in held) == int((x > 0).sum())


def test_another_source_or_setting_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    feature_cases.planted_index(tmp_path)
    plain, blocks = feature_cases.plain_dictionary(), feature_cases.as_blocks(*feature_cases.planted(), 3)
    with pytest.raises(BadValue, match=r"other settings .*top: there 20, asked 5"):
        feature_cases.planted_index(tmp_path, top=5)
    with pytest.raises(BadValue, match="another source"):
        gather(plain, None, "resid.1", feature_cases.as_blocks(*feature_cases.planted(1), 3), tokens=None, folder=tmp_path)
    with pytest.raises(BadValue, match="longer source"):
        gather(plain, None, "resid.1", blocks[:2], tokens=None, folder=tmp_path)
    with pytest.raises(BadValue, match="shorter source"):
        gather(plain, None, "resid.1", [*blocks, blocks[0]], tokens=None, folder=tmp_path)
    with torch.no_grad():
        plain.W_dec[0, 1] = 0.5
    with pytest.raises(BadValue, match=r"other settings .*dictionary"):
        gather(plain, None, "resid.1", blocks, tokens=None, folder=tmp_path)


@pytest.mark.parametrize("name", ["index.safetensors", "words.json"])
def test_a_changed_file_is_noticed(tmp_path: Path, name: str) -> None:
    feature_cases.planted_index(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1] + b" ")
    with pytest.raises(BadValue, match=f"{name} is not the file"):
        open_index(tmp_path)


def test_what_cannot_be_indexed_is_told_in_one_sentence(tmp_path: Path) -> None:
    plain = feature_cases.plain_dictionary()
    ids, x, lengths = feature_cases.planted()
    broken = x.clone()
    broken[7, 2] = float("nan")
    with pytest.raises(BadValue, match=r"1 of \d+ activations hold NaN"):
        gather(plain, None, None, [Block(ids, broken, lengths)], folder=tmp_path / "a")
    with pytest.raises(BadValue, match="windows of 3 tokens"):
        gather(plain, None, None, [Block(ids, x, torch.tensor([3]))], folder=tmp_path / "b")
    with pytest.raises(EmptyCorpus):
        gather(plain, None, None, [Block(ids[:0], x[:0], lengths[:0])], folder=tmp_path / "c")
    with pytest.raises(UnknownKnob, match="tops"):
        gather(plain, None, None, [Block(ids, x, lengths)], folder=tmp_path / "d", tops=3)
    with pytest.raises(BadValue, match="top must be 1 or more"):
        gather(plain, None, None, [Block(ids, x, lengths)], folder=tmp_path / "d", top=0)
    with pytest.raises(BadValue, match="needs model= and site="):
        gather(plain, None, None, ["a text"], folder=tmp_path / "e")
    with pytest.raises(BadValue, match="holds no harvest"):
        gather(plain, None, None, str(tmp_path), folder=tmp_path / "e")
    with pytest.raises(BadValue, match="width 12"):
        gather(plain, None, None, [Block(ids, x[:, :5], lengths)], folder=tmp_path / "f")
    with pytest.raises(BadValue, match="no finished feature index"):
        open_index(tmp_path / "nothing")


def test_a_limit_cuts_the_source_and_a_short_source_says_so(tmp_path: Path) -> None:
    ids, x, lengths = feature_cases.planted()
    made = gather(feature_cases.plain_dictionary(), None, None, feature_cases.as_blocks(ids, x, lengths, 4), tokens=700, folder=tmp_path / "a")
    assert made.tokens == 700
    assert torch.equal(made.count, (x[:700] > 0).sum(0))
    assert made.note == ""
    short = gather(feature_cases.plain_dictionary(), None, None, [Block(ids, x, lengths)], tokens=10**6, folder=tmp_path / "b")
    assert f"ended after {len(ids):,} of the 1,000,000" in short.note


# ---- models and harvests


@pytest.fixture(scope="module")
def model() -> Any:
    return glasshouse.load(families.build("llama"), tokenizer=families.build_tokenizer())


def random_dictionary(width: int = 64, seed: int = 3) -> Any:
    from glasshouse.dictionaries import ARCHITECTURES

    dictionary = ARCHITECTURES["topk"](families.WIDTH, width, 4)
    dictionary.start(torch.Generator().manual_seed(seed))
    return dictionary.requires_grad_(False)


def corpus() -> torch.Tensor:
    return torch.randint(3, families.VOCAB, (40, 25), generator=torch.Generator().manual_seed(1))


def test_a_model_that_reads_and_a_harvest_give_the_same_index(model: Any, tmp_path: Path) -> None:
    dictionary = random_dictionary()
    live = gather(dictionary, model, "resid.1", corpus(), tokens=900, folder=tmp_path / "live", skip_bos=False, context=10, seed=0)
    held = glasshouse.harvest(model, ["embed", "resid.1"], corpus(), 900, tmp_path / "harvest", context=10, dtype="float32", shard_tokens=300)
    stored = gather(dictionary, model, "resid.1", held, tokens=None, folder=tmp_path / "stored", seed=0)
    assert live.tokens == stored.tokens == 900
    assert torch.equal(live.tensors["window_start"], stored.tensors["window_start"])
    assert torch.equal(live.tensors["token_ids"], stored.tensors["token_ids"])
    assert torch.equal(live.count, stored.count)
    torch.testing.assert_close(live.peak, stored.peak, rtol=1e-4, atol=1e-5)
    values = model.at("resid.1", corpus()[:, :10])["resid.1"]
    assert live.peak.max() >= dictionary.encode(values).max() - 1e-4
    assert live.settings["model"] == stored.settings["model"] == model.fingerprint()
    assert live.words[50] == model.decode([50])


def test_a_harvest_must_be_of_the_model_and_have_the_site(model: Any, tmp_path: Path) -> None:
    held = glasshouse.harvest(model, "resid.1", corpus(), 500, tmp_path / "harvest", dtype="float32")
    other = glasshouse.load(families.build("llama", seed=1), tokenizer=families.build_tokenizer())
    with pytest.raises(BadValue, match="harvested from another model"):
        gather(random_dictionary(), other, "resid.1", held, folder=tmp_path / "a")
    with pytest.raises(BadValue, match="has no site"):
        gather(random_dictionary(), model, "resid.2", held, folder=tmp_path / "a")
    without = gather(random_dictionary(), None, None, tmp_path / "harvest", tokens=None, folder=tmp_path / "b")
    assert without.settings["site"] == "resid.1"
    assert without.top(int(without.count.argmax()))[0].tokens[0].startswith("[")


def test_a_harvest_that_does_not_say_where_windows_end_is_noted(model: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from glasshouse.records import file_hash

    held = glasshouse.harvest(model, "resid.1", corpus(), 500, tmp_path / "harvest", dtype="float32")
    shard = held.folder / held.shards[0]
    assert int(load_file(shard)["window_lengths"].sum()) == 500
    save_file({name: tensor for name, tensor in load_file(shard).items() if name != "window_lengths"}, shard)
    manifest = json.loads((held.folder / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = file_hash(shard)
    (held.folder / "manifest.json").write_text(json.dumps(manifest))
    made = gather(random_dictionary(), model, "resid.1", held, tokens=None, folder=tmp_path / "a")
    assert "Where windows end is not known" in made.note
    assert made.windows == 1


def test_start_tokens_are_left_out(model: Any, tmp_path: Path) -> None:
    made = gather(random_dictionary(), model, "resid.1", ["<bos>abc abc", "<bos>bcd"], tokens=None, folder=tmp_path)
    assert 1 not in made.tensors["token_ids"].tolist()
    assert made.tensors["window_start"].diff().tolist() in ([7, 3], [3, 7])


def test_tokens_are_spelt_as_they_stand_in_a_text() -> None:
    from types import SimpleNamespace

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "a": 3}, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.decoder = decoders.WordPiece()
    sentence = Tokenizer(models.WordLevel({"<unk>": 0, "▁play": 1, "ing": 2, "▁a": 3}, unk_token="<unk>"))
    sentence.pre_tokenizer = pre_tokenizers.Metaspace()
    sentence.decoder = decoders.Metaspace()
    for tokenizer in (pieces, sentence):
        word = word_list(SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer)))  # type: ignore[arg-type]
        assert "".join(map(word, [3, 1, 2])) == " a playing"
    assert word_list(None)(7) == "[7]"


def test_the_fingerprint_of_a_dictionary_follows_its_weights() -> None:
    one, two = random_dictionary(), random_dictionary()
    assert fingerprint(one) == fingerprint(two)
    with torch.no_grad():
        two.W_enc[0, 0] += 1e-3
    assert fingerprint(one) != fingerprint(two)
    with torch.no_grad():
        two.W_enc[0, 0], two.W_enc[5, 3] = one.W_enc[0, 0], -one.W_enc[5, 3]
    assert fingerprint(one) != fingerprint(two)


def test_the_fingerprint_does_not_depend_on_the_number_of_threads() -> None:
    wide, threads = random_dictionary(8192), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(fingerprint(wide))
    finally:
        torch.set_num_threads(threads)
    assert len(set(found)) == 1
