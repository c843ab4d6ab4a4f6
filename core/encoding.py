"""
Chat turns and pictures -> token ids -> batches. Ids are never turned into text and back.

The names of special tokens in a question or a response ("<|im_end|>", "<|image_pad|>") are read as
the characters that they are, in training as in vLLM. A server tokenizes itself, and decides itself.
"""

import re
from dataclasses import dataclass, field
from itertools import chain

import torch

from core.files import InputError, in_short
from core.model_folder import load_config
from core.pictures import BadPicture, open_picture, opened
from core.shared_prompts import collate_shared, row_length, rows_of

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
VISION_INPUTS = (*PIXELS.values(), "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
MODEL_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", *VISION_INPUTS)


@dataclass
class Media:
    """The pictures of one prompt as qwen-vl-utils reads them: sized, and the frames chosen."""

    images: list | None = None  # PIL images
    videos: list | None = None  # tensors, (frames, channels, height, width)
    video_metadata: list | None = None  # a dict per video: frame rate, which frames, ...


@dataclass(eq=False)
class Sample:
    """One sequence: a prompt, a response, the pictures, and what the steps of rl.py add to it."""

    prompt_ids: list[int]
    token_types: list[int]  # of the prompt's tokens: 0 text, 1 image, 2 video
    vision: dict  # VISION_INPUTS as arrays; samples of one prompt share this very dict
    media: Media | None = None  # the pictures themselves, for vLLM
    response_ids: list[int] = field(default_factory=list)  # with the end token, if it came to that
    # 1. rollout
    pair: object = None  # the Pair, or in stage 5 the Task, of the prompt
    place: int = 0  # among the samples of a rollout over all ranks
    group: int = 0  # the same number for all samples of one prompt
    text: str = ""  # the response without its end token
    finish: str = ""  # "stop", or "length" where --max_new_tokens cut it off
    sampled_logps: list[float] | None = None  # by vLLM, a number per response token
    # 4. old log-probabilities, 6. advantages: each a tensor (response tokens,)
    old_logps: torch.Tensor | None = None
    reference_logps: torch.Tensor | None = None
    advantages: torch.Tensor | None = None

    @property
    def length(self):
        return len(self.prompt_ids) + len(self.response_ids)


# --------------------------------------------------------------------------------------------------
# Turns -> samples


def load_processor(folder, min_pixels=None, max_pixels=None):
    """
    Load the processor of a folder or a hub name. The bounds of a picture's size, where given,
    replace its own, and are saved with it: whoever loads the saved folder sees the same pictures.
    """
    from transformers import AutoProcessor

    load_config(folder)  # a folder that is not whole is refused
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a damaged file makes of it
        raise InputError(
            f"--model {folder}: its tokenizer or processor cannot be loaded ({in_short(error)}); "
            "copy the folder again, or run the stage that makes it again"
        ) from None
    for part in (processor.image_processor, processor.video_processor):
        part.size = {
            "shortest_edge": min_pixels or part.size["shortest_edge"],
            "longest_edge": max_pixels or part.size["longest_edge"],
        }
    return processor


def read_media(processor, turns):
    """Read the pictures of chat turns, sized within the processor's bounds."""
    from qwen_vl_utils import process_vision_info

    bounds = {
        "image": pixel_bounds(processor.image_processor),
        "video": pixel_bounds(processor.video_processor),
        "text": {},
    }
    sized = []
    for turn in turns:
        if not isinstance(turn["content"], str):
            content = [opened_part(part) | bounds[part["type"]] for part in turn["content"]]
            sized.append(turn | {"content": content})
    images, videos, _ = process_vision_info(
        sized,
        return_video_kwargs=True,
        return_video_metadata=True,
        image_patch_size=processor.image_processor.patch_size,
    )
    if not videos:
        return Media(images)
    frames, metadata = zip(*videos)
    return Media(images, list(frames), list(metadata))


def opened_part(part):
    """A part of a turn with PIL images in the place of paths: qwen-vl-utils would fetch URLs."""
    if part["type"] == "image":
        return part | {"image": open_picture(part["image"])}
    if part["type"] == "video":
        frames = [open_picture(path) for path in part["video"]]
        for path, frame in zip(part["video"], frames):
            if frame.size != frames[0].size:
                raise BadPicture(f"frames of {frames[0].size} and {frame.size} pixels", path)
        return part | {"video": frames}
    return part


def pixel_bounds(picture_processor):
    size = picture_processor.size
    return {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}


def encode(processor, turns, response=None, media=None):
    """Encode chat turns and, if given, the assistant's response (a text) after them."""
    media = media or read_media(processor, turns)
    prompt = render(processor, turns)
    options = {"do_resize": False}  # read_media has sized the pictures and chosen the frames
    if media.videos:
        options |= {"video_metadata": media.video_metadata, "do_sample_frames": False}
    inputs = processor(text=[prompt.text], images=media.images, videos=media.videos, **options)
    vision = {name: inputs[name] for name in VISION_INPUTS if name in inputs}
    response_ids = []
    if response is not None:
        response_ids = text_ids(processor.tokenizer, response)
        response_ids.append(processor.tokenizer.eos_token_id)
    return Sample(
        prompt_ids=prompt.insert(list(inputs["input_ids"][0]), prompt.ids),
        token_types=prompt.insert(list(inputs["mm_token_type_ids"][0]), [0] * len(prompt.ids)),
        vision={name: torch.as_tensor(values).numpy() for name, values in vision.items()},
        response_ids=response_ids,
    )


@dataclass
class RenderedPrompt:
    """A prompt as the processor takes it. Texts that name special tokens are ids already."""

    text: str
    ids: list[int]  # to insert into the ids of the text
    tokens_after: int  # of the text, behind the place of these ids

    def insert(self, row, inserted):
        place = len(row) - self.tokens_after
        return row[:place] + inserted + row[place:]


def render(processor, turns):
    """Apply the chat template, so that only the template's own special tokens are read as such."""
    (turn,) = turns
    *pictures, text = turn["content"]
    apply = processor.apply_chat_template
    if not starts_of_special_tokens(processor.tokenizer, text["text"]):
        return RenderedPrompt(apply(turns, tokenize=False, add_generation_prompt=True), [], 0)
    marked = [turn | {"content": [*pictures, text | {"text": PLACE}]}]
    before, after = apply(marked, tokenize=False, add_generation_prompt=True).split(PLACE)
    tokens_after = len(processor.tokenizer(after)["input_ids"])  # it begins with a special token
    return RenderedPrompt(before + after, text_ids(processor.tokenizer, text["text"]), tokens_after)


PLACE = "\ue000"  # stands for a text in the chat template, which has no such character


def text_ids(tokenizer, text):
    """The ids of a text. The name of a special token is cut behind its first character."""
    ids, start = [], 0
    for special in starts_of_special_tokens(tokenizer, text):
        ids += tokenizer(text[start : special + 1], add_special_tokens=False)["input_ids"]
        start = special + 1
    return ids + tokenizer(text[start:], add_special_tokens=False)["input_ids"]


def starts_of_special_tokens(tokenizer, text):
    tokens = tokenizer.added_tokens_decoder.values()
    names = "|".join(re.escape(token.content) for token in tokens if token.special)
    return [match.start() for match in re.finditer(f"(?={names})", text)] if names else []


def encode_prompt(processor, turns):
    """Encode a prompt to sample from; vLLM needs the pictures themselves as well."""
    media = read_media(processor, turns)
    sample = encode(processor, turns, media=media)
    sample.media = media
    return sample


def prompt_length(processor, turns):
    """
    Count the tokens of encode(processor, turns) from the headers of its images alone, so that
    every prompt of a data set can be checked before a run starts.
    """
    parts = []
    for turn in turns:
        parts += turn["content"]
    if any(part["type"] == "video" for part in parts):
        return encode(processor, turns).length
    tokens = len(prompt_ids(processor, turns))
    for part in parts:
        if part["type"] == "image":
            tokens += image_tokens(processor.image_processor, part["image"]) - 1  # text has one
    return tokens


def prompt_ids(processor, turns):
    """The ids of a prompt with one token for each picture, as vLLM takes it."""
    prompt = render(processor, turns)
    return prompt.insert(processor.tokenizer(prompt.text)["input_ids"], prompt.ids)


def image_tokens(image_processor, path):
    from qwen_vl_utils import smart_resize

    with opened(path) as image:
        width, height = image.size  # one that lies on its side has as many tokens
    side = image_processor.patch_size * image_processor.merge_size  # pixels that make one token
    height, width = smart_resize(height, width, side, **pixel_bounds(image_processor))
    return height * width // side**2


# --------------------------------------------------------------------------------------------------
# Samples -> batches


def collate(samples, pad_id, device="cpu", left=False):
    """
    Pad samples to a batch. Neighbours with the same prompt share a row, see core/shared_prompts.py.
    The model's inputs (B, T), see MODEL_INPUTS, and for S samples

        response_mask (S, R)  True where sample s has an r-th response token
        response_ids (N,)     those tokens
        predict_from (N,)     where in the flattened (B * T) each of them is predicted
        last_token (S,)       where in the flattened (B * T) each sample ends
        image_index, video_index (pictures,)   see first_occurrences

    Padding is at the end: no token attends to it, so attention needs no mask, and its kernels are
    faster without. left=True pads in front, with a mask and a row for each sample, to generate
    from. No samples make a row of two padding tokens with nothing to predict.
    """
    rows = [[sample] for sample in samples] if left else rows_of(samples)
    filled_rows = rows or [[Sample([pad_id, pad_id], [0, 0], vision={})]]
    width = max(row_length(row) for row in filled_rows)
    input_ids = torch.full((len(filled_rows), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    token_types = torch.zeros_like(input_ids)  # a response is text, type 0
    row_starts = []  # in the flattened (B * T)
    for number, row in enumerate(filled_rows):
        prompt, length = row[0], row_length(row)
        start = width - length if left else 0
        ids = [*prompt.prompt_ids, *chain(*(sample.response_ids for sample in row))]
        input_ids[number, start : start + length] = torch.tensor(ids)
        attention_mask[number, start : start + length] = 1
        types = torch.tensor(prompt.token_types)
        token_types[number, start : start + len(types)] = types
        row_starts.append(number * width + start)
    # without the types, positions would silently have one dimension in the place of three
    batch = {"input_ids": input_ids, "mm_token_type_ids": token_types}
    if left:
        batch["attention_mask"] = attention_mask
    batch |= collate_responses(rows, row_starts)
    batch |= collate_shared(rows, width)
    batch |= collate_vision([row[0] for row in rows])
    return {name: tensor.to(device) for name, tensor in batch.items()}


def collate_responses(rows, row_starts):
    lengths, response_ids, predict_from, last_token = [], [], [], []
    for row, start in zip(rows, row_starts):
        place = start + len(row[0].prompt_ids)
        last_of_prompt = place - 1
        for sample in row:
            count = len(sample.response_ids)
            seen = [last_of_prompt, *range(place, place + count)]
            predict_from += seen[:-1]  # each token is predicted by the one before it
            last_token.append(seen[-1])
            response_ids += sample.response_ids
            lengths.append(count)
            place += count
    places = torch.arange(max(lengths, default=0))
    return {
        "response_mask": places < torch.tensor(lengths, dtype=torch.long)[:, None],
        "response_ids": torch.tensor(response_ids, dtype=torch.long),
        "predict_from": torch.tensor(predict_from, dtype=torch.long),
        "last_token": torch.tensor(last_token, dtype=torch.long),
    }


def collate_vision(samples):
    batch = {}
    for name in VISION_INPUTS:
        arrays = [sample.vision[name] for sample in samples if name in sample.vision]
        if arrays:
            batch[name] = torch.cat([torch.as_tensor(array) for array in arrays])
    for kind in PIXELS:
        index = first_occurrences(samples, kind)
        if index:
            batch[f"{kind}_index"] = torch.tensor(index)
    return batch


def first_occurrences(samples, kind):
    """
    For each picture of a batch, the number of the first one that is the same. Samples of one
    prompt share its pictures, and the vision tower sees each of them once.
    """
    index, first_of = [], {}
    for sample in samples:
        shared = id(sample.vision)
        if shared not in first_of:
            first_of[shared] = len(index)
        count = len(sample.vision.get(f"{kind}_grid_thw", ()))
        index += range(first_of[shared], first_of[shared] + count)
    return index
