"""core/sampler.py on the toy's model: both samplers, and the weights that one takes."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from test_policy import BASE, ROOT, save_picture

from core.encoding import Media, Sample, encode, encode_prompt, load_processor
from core.files import InputError
from core.pairs import user_turn
from core.policy import load_policy, save_policy
from core.sampler import (
    HFSampler,
    VLLMSampler,
    check_same_prompt,
    collapse_pads,
    forbidden_token_ids,
    has_all_weights,
    start_vllm,
    vllm_media,
)

END, SECOND_END = 689, 464  # <|im_end|>, and what one of the answers holds
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def turns(tmp_path_factory):
    """An image, a text, two images, one of them larger than the processor's bounds."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    small = [save_picture(folder / f"{seed}.png", seed) for seed in range(2)]
    large = str(folder / "large.png")
    Image.new("RGB", (300, 200), "blue").save(large)
    prompts = ([small[0]], "What is it?"), ([], "How many?"), ([small[1], large], "Which?")
    return [user_turn(images, None, text) for images, text in prompts]


def run_program(name, *words):
    """What a program of tests/programs prints."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "programs" / name, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def ask_vllm(name, folder, turns, tmp_path):
    """The JSON that a program writes about a folder and chat turns."""
    (tmp_path / "turns.json").write_text(json.dumps(turns))
    run_program(name, folder, tmp_path / "turns.json", tmp_path / "out.json")
    return json.loads((tmp_path / "out.json").read_text())


@pytest.mark.slow
def test_a_saved_folder_loads_in_vllm_and_answers_the_same(turns, tmp_path):
    """With a reward head in it, too. And matrices that vLLM has packed take no new weights."""
    policy = load_policy(BASE, "critic", torch.float32)
    policy.model.generation_config.eos_token_id = [END, SECOND_END]
    save_policy(policy, load_processor(BASE, 3136, 12544), tmp_path / "saved")
    found = ask_vllm("read_by_vllm.py", tmp_path / "saved", turns, tmp_path)
    again = load_policy(tmp_path / "saved", dtype=torch.float32)
    processor = load_processor(tmp_path / "saved")
    samples = [encode(processor, each) for each in turns]
    ours = HFSampler(again, processor, CPU).generate(samples, temperature=0.0, max_tokens=16)
    for (prompt_ids, ids, ended), sample, (response,) in zip(found["answers"], samples, ours):
        assert prompt_ids == sample.prompt_ids
        assert ids == response.ids
        assert ended == response.ended
    assert {response.ids[-1] for (response,) in ours if response.ended} == {END, SECOND_END}
    assert "call speed_up_vllm() of toy/cpu.py before" in found["error"]


@pytest.mark.slow
def test_vllm_takes_the_weights_in_parts(turns, tmp_path):
    """
    Log-probabilities match before and after, samples repeat, a weight left out is missed. And
    nothing was compiled: a first rollout would wait for it.
    """
    frames = [turns[0][0]["content"][0]["image"]] * 4
    turns = [*turns, user_turn([], frames, "What moves?")]
    found = ask_vllm("sync_weights.py", BASE, turns, tmp_path)
    assert found["as loaded"] == found["again"]
    ids, gap = found["as loaded"]
    assert gap < 1e-5
    assert found["in turns"][0] == ids
    assert found["in turns"][1] < 1e-5
    assert [len(responses) for responses in ids] == [2] * 4
    for size in (1, 16):
        before, missing, after = found[f"{size} a call"]
        assert before > 1e-3 > 1e-5 > after, size
        assert missing == []
    assert found["left out"] == ["visual.blocks.0.attn.proj.weight"]
    assert found["compiled"] == {}


@pytest.mark.slow
def test_vllm_samples_from_logits_that_are_not_rounded():
    assert "RESULT torch.bfloat16 torch.float32\n" in run_program("logits_in_float32.py", BASE)


def test_generate_gives_n_responses_a_prompt_and_repeats_them(turns):
    processor = load_processor(BASE)
    sampler = HFSampler(load_policy(BASE, dtype=torch.float32), processor, CPU)
    prompts = [encode_prompt(processor, each) for each in turns]
    first = sampler.generate(prompts, [1, 2, 3], n=2, max_tokens=12)
    again = sampler.generate(prompts, [1, 2, 3], n=2, max_tokens=12)
    other = sampler.generate(prompts, [4, 5, 6], n=2, max_tokens=12)
    assert [len(responses) for responses in first] == [2, 2, 2]
    assert first == again != other
    for response in itertools.chain(*first):
        assert response.ended == (response.ids[-1] == END)
        assert END not in response.ids[:-1]
        assert not set(response.ids) & set(sampler.forbidden)


def test_each_end_token_of_a_model_ends_a_response(turns):
    """The responses are those of a model with one end token, up to the first of the two."""
    processor = load_processor(BASE)
    policy = load_policy(BASE, dtype=torch.float32)
    prompts = [encode_prompt(processor, each) for each in turns]
    options = {"temperature": 0.0, "max_tokens": 12}
    whole = HFSampler(policy, processor, CPU).generate(prompts, **options)
    policy.model.generation_config.eos_token_id = [END, SECOND_END]
    found = HFSampler(policy, processor, CPU).generate(prompts, **options)
    assert {response.ids[-1] for (response,) in found} == {END, SECOND_END}
    for (before,), (response,) in zip(whole, found):
        assert response.ended and before.ended
        assert response.ids == before.ids[: len(response.ids)]
        assert not {END, SECOND_END} & set(response.ids[:-1])


def test_generate_reads_the_prompt_alone(turns):
    """A sample that has a response already is sampled from anew, and stays as it was."""
    processor = load_processor(BASE)
    sampler = HFSampler(load_policy(BASE, dtype=torch.float32), processor, CPU)
    prompt = encode(processor, turns[0])
    answered = dataclasses.replace(prompt, response_ids=[END])
    options = {"temperature": 0.0, "max_tokens": 8}
    assert sampler.generate([answered], **options) == sampler.generate([prompt], **options)
    assert answered.response_ids == [END]


def test_markers_of_pictures_and_padding_are_forbidden():
    processor = load_processor(BASE)
    tokenizer = processor.tokenizer
    forbidden = forbidden_token_ids(processor, 704)
    names = tokenizer.convert_ids_to_tokens([i for i in forbidden if i < len(tokenizer)])
    markers = ["vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"]
    assert set(names) == {f"<|{marker}|>" for marker in markers}
    assert forbidden[len(markers) :] == list(range(len(tokenizer), 704))


def test_vllm_gets_one_pad_a_picture():
    assert collapse_pads([1, 8, 8, 8, 2, 2, 8, 9, 9, 8], pads=[8, 9]) == [1, 8, 2, 2, 8, 9, 8]


def test_another_prompt_than_ours_is_an_error():
    check_same_prompt([1, 2], [1, 2])
    with pytest.raises(RuntimeError, match="3 tokens where the processor makes 2"):
        check_same_prompt([1, 2], [1, 1, 2])


class EngineWithALog:
    """In the place of vLLM's engine. A request is answered in its third step."""

    def __init__(self):
        self.log, self.running = [], []

    def add_request(self, request_id, request, params):
        self.log.append(f"add {request_id}")
        self.running.append([3, SimpleNamespace(request_id=request_id, params=params)])

    def has_unfinished_requests(self):
        return bool(self.running)

    def step(self):
        self.log.append("step")
        for request in self.running:
            request[0] -= 1
        finished = [output for left, output in reversed(self.running) if left == 0]
        self.running = [request for request in self.running if request[0] > 0]
        return finished


def test_vllm_works_while_prompts_are_still_added():
    """A step takes six tokens, which are two prompts."""
    engine = EngineWithALog()
    sampler = object.__new__(VLLMSampler)
    sampler.llm = SimpleNamespace(llm_engine=engine)
    sampler.pads, sampler.step_tokens = [], 6
    prompts = [Sample([1, 2, 3], [0, 0, 0], {}, media=Media()) for _ in range(7)]
    outputs = sampler.ask(prompts, list("abcdefg"))
    assert [output.params for output in outputs] == list("abcdefg")
    added = "add 0, add 1, step, add 2, add 3, step, add 4, add 5, step, add 6"
    assert ", ".join(engine.log) == added + ", step" * 3


def test_a_text_has_no_media_for_vllm():
    assert vllm_media(Media()) == {}


def test_packed_matrices_are_noticed():
    layer = torch.nn.Linear(2, 2)
    assert has_all_weights(layer)
    layer.weight.data = torch.empty(0)
    assert not has_all_weights(layer)


# --------------------------------------------------------------------------------------------------
# The start of vLLM


def start_with(monkeypatch, llm, on_gpu=True, **options):
    """start_vllm() with a function in the place of vLLM's LLM."""
    platforms = SimpleNamespace(current_platform=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=llm))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(os, "environ", {})
    return start_vllm("out/rl", 4096, **options)


def test_vllm_runs_in_this_process_and_ends_with_it(monkeypatch):
    for on_gpu in (True, False):
        environment = start_with(monkeypatch, lambda *_, **__: dict(os.environ), on_gpu)
        assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        platform = sys.modules["vllm.platforms"].current_platform
        compiles = not hasattr(platform, "simple_compile_backend")
        assert compiles == on_gpu


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ValueError("No available memory for the cache blocks. Try"), "No available memory for"),
        (ValueError("1 validation error\n  Value error, Not divisible"), "Not divisible ..."),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "CUDA out of memory. Tried to"),
    ],
)
def test_what_keeps_vllm_from_starting_is_named_with_its_flags(monkeypatch, error, cause):
    def fail(*_, **__):
        raise error

    options = {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.4}
    with pytest.raises(InputError) as stopped:
        start_with(monkeypatch, fail, **options)
    flags = "--model out/rl --context 4096 --tensor_parallel 2 --memory 0.4"
    assert str(stopped.value).startswith(f"vLLM does not start with {flags}: {cause}")
    assert "\n" not in str(stopped.value)


def test_another_error_of_vllm_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("NCCL error")

    with pytest.raises(RuntimeError, match="NCCL error"):
        start_with(monkeypatch, fail)
