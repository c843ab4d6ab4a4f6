"""Samplers: vLLM inside the trainer's process, or transformers' generate as a slow second one."""

import contextlib
import os
from dataclasses import dataclass, replace

import torch

from core.encoding import MODEL_INPUTS, collate
from core.files import InputError, in_short
from core.quiet import no_warnings_from_torchs_core

MAX_PICTURES = 8  # images in a prompt


@dataclass
class Generated:
    ids: list[int]  # response tokens, with the end token if it came to that
    logps: list[float] | None  # of each token, if asked for
    ended: bool  # with an end token, not by max_tokens


class VLLMSampler:
    """One vLLM engine inside this rank's process. On a GPU it sleeps while the trainer works."""

    def __init__(
        self, folder, processor, device, seed=0, tensor_parallel=1, context=4096, memory=0.4
    ):
        self.on_gpu = device.type == "cuda"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are loaded in this process
        options = {}
        if self.on_gpu:
            options = {"gpu_memory_utilization": memory, "enable_sleep_mode": True}
        self.llm = start_vllm(
            folder,
            context,
            seed=seed,
            tensor_parallel_size=tensor_parallel,
            limit_mm_per_prompt={"image": MAX_PICTURES, "video": 1},
            distributed_executor_backend="external_launcher",
            max_num_seqs=256,
            # the trainer computes logits in float32, so they are not rounded to bfloat16 here
            hf_overrides={"head_dtype": "float32"},
            **options,
        )
        model_config = self.llm.llm_engine.model_config
        vocabulary = model_config.get_vocab_size()
        self.logit_bias = dict.fromkeys(forbidden_token_ids(processor, vocabulary), -100.0)
        tokenizer = processor.tokenizer
        self.pads = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
        generation_config = model_config.try_get_generation_config()
        self.ends = end_token_ids(tokenizer, generation_config.get("eos_token_id"))
        limits = self.llm.llm_engine.vllm_config.scheduler_config
        self.step_tokens = limits.max_num_batched_tokens  # prompt tokens that one step takes
        self.can_load = self.llm.apply_model(has_all_weights)[0]

    def generate(self, prompts, seeds, n=1, temperature=1.0, max_tokens=1024, logps=False):
        """
        n responses to each prompt (a Sample with its media), a list of Generated per prompt.
        Sampled from exactly the policy: no top-p, no top-k, no penalty. logps take a tenth longer.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        common = {
            "n": n,
            "temperature": temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": max_tokens,
            "logprobs": 0 if logps else None,  # 0: of the sampled token only
            "detokenize": False,
            "logit_bias": self.logit_bias,
            "stop_token_ids": self.ends,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        params = [SamplingParams(seed=seed, **common) for seed in seeds]
        outputs = self.ask(prompts, params)
        responses = []
        for prompt, output in zip(prompts, outputs):
            check_same_prompt(prompt.prompt_ids, list(output.prompt_token_ids))
            responses.append([generated(completion, logps) for completion in output.outputs])
        return responses

    def ask(self, prompts, params):
        """
        vLLM's output for each prompt, in their order. A step begins as soon as there are enough
        prompts for it, so that a GPU does not wait until all of them are prepared.
        """
        engine = self.llm.llm_engine
        outputs, waiting = {}, 0
        for number, (prompt, sampling) in enumerate(zip(prompts, params)):
            ids = collapse_pads(prompt.prompt_ids, self.pads)
            request = {"prompt_token_ids": ids, **vllm_media(prompt.media)}
            engine.add_request(str(number), request, sampling)
            waiting += len(prompt.prompt_ids)
            if waiting >= self.step_tokens:
                outputs |= finished_in_step(engine)
                waiting = 0
        while engine.has_unfinished_requests():
            outputs |= finished_in_step(engine)
        return [outputs[str(number)] for number in range(len(prompts))]

    def sleep(self):
        """Give the GPU's memory to the trainer. The weights come back with the next sync."""
        if self.on_gpu:
            torch.cuda.synchronize()
            self.llm.sleep(level=2)

    def wake_weights(self):
        """Before a sync: make room for the weights, with the memory that the trainer has freed."""
        if self.on_gpu:
            self.llm.wake_up(tags=["weights"])

    def load_weights(self, named_tensors):
        """
        Load tensors by their names in transformers' model. Returns vLLM's names of the weights
        that they became, or became part of.
        """
        if not self.can_load:
            raise RuntimeError(
                "vLLM has packed its matrices for this CPU and takes no new weights; call "
                "speed_up_vllm() of toy/cpu.py before the sampler is made"
            )
        named_tensors = list(named_tensors)
        return self.llm.apply_model(lambda model: model.load_weights(named_tensors))[0]

    def weight_names(self):
        """All weights of vLLM's model."""
        return self.llm.apply_model(lambda model: {name for name, _ in model.named_parameters()})[0]

    def after_sync(self):
        """Forget what was computed with the old weights, and take back the rest of the memory."""
        self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_mm_cache()  # processed images
        self.llm.llm_engine.reset_encoder_cache()  # features of the vision tower
        if self.on_gpu:
            self.llm.wake_up(tags=["kv_cache"])


class HFSampler:
    """transformers' generate on the trainer's own weights, which need no sync."""

    def __init__(self, policy, processor, device):
        self.policy = policy
        self.device = device
        self.pad = processor.tokenizer.pad_token_id
        of_model = policy.model.generation_config.eos_token_id
        self.ends = end_token_ids(processor.tokenizer, of_model)
        vocabulary = policy.model.config.get_text_config().vocab_size
        self.forbidden = forbidden_token_ids(processor, vocabulary)

    @torch.no_grad()
    def generate(
        self, prompts, seeds=None, n=1, temperature=1.0, max_tokens=1024, logps=False, batch_size=32
    ):
        """
        As VLLMSampler.generate, without log-probabilities. The seed of a batch is its first
        sample's, so samples repeat in the same batches only.
        """
        samples = []
        for prompt in prompts:
            samples += [replace(prompt, response_ids=[]) for _ in range(n)]
        model = self.policy.model
        training = model.training
        model.eval()  # in training mode, recomputation would turn the cache of keys and values off
        responses = []
        for start in range(0, len(samples), batch_size):
            if temperature:
                torch.manual_seed(seeds[start // n])
            batch = collate(samples[start : start + batch_size], self.pad, self.device, left=True)
            responses += self.generate_batch(batch, temperature, max_tokens)
        model.train(training)
        return [responses[start : start + n] for start in range(0, len(samples), n)]

    def generate_batch(self, batch, temperature, max_tokens):
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        sequences = self.policy.model.generate(
            **{name: batch[name] for name in MODEL_INPUTS if name in batch},
            **sampling,
            max_new_tokens=max_tokens,
            suppress_tokens=self.forbidden,
            eos_token_id=self.ends,
            pad_token_id=self.pad,
            repetition_penalty=1.0,
            use_cache=True,
        )
        responses = []
        for ids in sequences[:, batch["input_ids"].shape[1] :].tolist():
            end = next((i for i, token in enumerate(ids) if token in self.ends), None)
            if end is not None:
                ids = ids[: end + 1]
            responses.append(Generated(ids, logps=None, ended=end is not None))
        return responses

    def sleep(self):
        pass

    def wake_weights(self):
        pass

    def load_weights(self, named_tensors):
        return set()

    def weight_names(self):
        return set()

    def after_sync(self):
        pass


def start_vllm(folder, context, **options):
    """
    Start vLLM in this process, with what it needs on a CPU.

    A process of its own would live on, with all its memory, when this one is killed.
    """
    on_gpu = torch.cuda.is_available()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if on_gpu else "ERROR")
    # standard output is for results
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    if not on_gpu:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        options |= {
            "dtype": "float32",
            "enforce_eager": True,
            # a seeded request whose prompt is processed in chunks stops vLLM on a CPU
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(8192, context),
        }
        compile_nothing()
    from vllm import LLM

    try:
        with contextlib.nullcontext() if on_gpu else no_warnings_from_torchs_core():
            return LLM(str(folder), max_model_len=context, use_tqdm_on_load=False, **options)
    except (ValueError, torch.OutOfMemoryError) as error:
        raise InputError(why_not_started(error, folder, context, options)) from error


def compile_nothing():
    """
    Keep vLLM from compiling a few small functions, which it does in spite of enforce_eager: the
    first rollout of two ranks on two cores waited 26 s for them. Call it before vLLM is imported.
    """
    from vllm.platforms import current_platform

    current_platform.simple_compile_backend = "eager"


def why_not_started(error, folder, context, options):
    """One line about vLLM's error, with the flags that it may come from."""
    given = f"--model {folder} --context {context}"
    for flag, option in (
        ("--tensor_parallel", "tensor_parallel_size"),
        ("--memory", "gpu_memory_utilization"),
    ):
        if option in options:
            given += f" {flag} {options[option]}"
    # pydantic's first line only counts the errors
    cause = str(error).partition("Value error, ")[2] or str(error)
    return (
        f"vLLM does not start with {given}: {in_short(cause)} ...; change one of these, or give it "
        "more memory (on a CPU the variable VLLM_CPU_KVCACHE_SPACE, in GiB)"
    )


def finished_in_step(engine):
    """{number of a request: its output} of those that end in vLLM's next step."""
    return {output.request_id: output for output in engine.step()}


def has_all_weights(model):
    """False where vLLM has packed matrices and left an empty tensor in the place of each."""
    return all(parameter.numel() for parameter in model.parameters())


def vllm_media(media):
    """The part of a vLLM prompt that holds its pictures, which are sized and chosen already."""
    data = {}
    if media.images:
        data["image"] = media.images
    if media.videos:
        data["video"] = []
        for video, metadata in zip(media.videos, media.video_metadata):
            frames = video.permute(0, 2, 3, 1).numpy().astype("uint8")
            data["video"].append((frames, metadata | {"do_sample_frames": False}))
    if not data:
        return {}
    return {"multi_modal_data": data, "mm_processor_kwargs": {"do_resize": False}}


def collapse_pads(ids, pads):
    """Leave one pad token per picture: vLLM repeats it itself, however many there are."""
    collapsed = []
    for token in ids:
        if token not in pads or collapsed[-1:] != [token]:
            collapsed.append(token)
    return collapsed


def generated(completion, with_logps):
    ids = list(completion.token_ids)
    logps = None
    if with_logps:
        # with logprobs=0, a step's dict holds the sampled token alone
        logps = [next(iter(step.values())).logprob for step in completion.logprobs]
    return Generated(ids, logps, ended=completion.finish_reason == "stop")


def check_same_prompt(prompt_ids, vllm_ids):
    if prompt_ids != vllm_ids:
        raise RuntimeError(
            f"vLLM read a prompt of {len(vllm_ids)} tokens where the processor makes "
            f"{len(prompt_ids)}: the two see different pictures (sizes, number of images) or use "
            "different chat templates"
        )


def end_token_ids(tokenizer, of_model):
    """
    The tokens that end a response: the tokenizer's one, and those of the model's
    generation_config.json, where vLLM stops too. A Qwen2.5-VL has <|im_end|> and <|endoftext|>.
    """
    others = [of_model] if isinstance(of_model, int) else of_model or []
    return list(dict.fromkeys([tokenizer.eos_token_id, *others]))


def forbidden_token_ids(processor, vocabulary):
    """
    Tokens that must not be sampled: markers of images and videos, behind which there would be no
    pixels, and the padding of the vocabulary.
    """
    tokenizer = processor.tokenizer
    forbidden = set(range(len(tokenizer), vocabulary))
    for token, number in tokenizer.get_vocab().items():
        if token.startswith("<|") and ("vision" in token or "_pad" in token):
            forbidden.add(number)
    return sorted(forbidden)
