"""core/encoding.py on the toy's processor: samples, batches, and where in them things are."""

import dataclasses

import pytest
import torch
from test_policy import BASE, save_picture

from core.encoding import (
    collate,
    encode,
    encode_prompt,
    load_processor,
    prompt_ids,
    prompt_length,
)
from core.pairs import InputError, user_turn
from core.sampler import collapse_pads


@pytest.fixture(scope="module")
def processor():
    return load_processor(BASE, 3136, 12544)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return save_picture(tmp_path_factory.mktemp("encoding") / "picture.png", 0)


def test_token_ids_stay_as_they_were_sampled(processor, picture):
    """Sampled letters stay a token each, though as text they would be split differently."""
    prompt = encode(processor, user_turn([picture], None, "Which?"))
    tokenizer = processor.tokenizer
    letters = [tokenizer(letter)["input_ids"][0] for letter in "<think>"]
    assert letters != tokenizer("<think>")["input_ids"]
    batch = collate([dataclasses.replace(prompt, response_ids=letters)], 0)
    assert batch["response_ids"].tolist() == letters
    assert batch["input_ids"][0].tolist() == prompt.prompt_ids + letters
    assert batch["mm_token_type_ids"][0].tolist() == prompt.token_types + [0] * len(letters)
    assert sum(prompt.token_types) == 4


def test_where_things_are_in_a_batch(processor):
    """A response of three tokens and a shorter sequence with two, padded behind and in front."""
    prompt = encode(processor, user_turn([], None, "Which?"))
    short = dataclasses.replace(prompt, prompt_ids=[5, 6], token_types=[0, 0], response_ids=[7, 8])
    long = dataclasses.replace(short, prompt_ids=[1, 2, 3], token_types=[0] * 3)
    long.response_ids = [9, 10, 11]
    batch = collate([short, long], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 0, 0], [1, 2, 3, 9, 10, 11]]
    assert "attention_mask" not in batch
    flat = batch["input_ids"].flatten()
    assert batch["response_ids"].tolist() == [7, 8, 9, 10, 11]
    assert flat[batch["predict_from"]].tolist() == [6, 7, 3, 9, 10]
    assert flat[batch["last_token"]].tolist() == [8, 11]
    assert batch["response_mask"].tolist() == [[True, True, False], [True, True, True]]
    left = collate([short, long], pad_id=0, left=True)
    flat = left["input_ids"].flatten()
    assert left["input_ids"][0].tolist() == [0, 0, 5, 6, 7, 8]
    assert left["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6]
    assert flat[left["predict_from"]].tolist() == [6, 7, 3, 9, 10]
    assert flat[left["last_token"]].tolist() == [8, 11]


def test_samples_of_one_prompt_share_its_pictures(processor, picture):
    two = encode(processor, user_turn([picture, picture], None, "Which?"))
    text = encode(processor, user_turn([], None, "Which?"))
    one = encode(processor, user_turn([picture], None, "Which?"))
    again = dataclasses.replace(two, response_ids=[1])
    batch = collate([two, text, one, again], 0)
    assert batch["image_index"].tolist() == [0, 1, 2, 0, 1]
    assert len(batch["image_grid_thw"]) == 5
    assert "video_index" not in batch


def test_pictures_keep_within_the_bounds_and_so_they_do_for_whoever_loads_the_folder(
    processor, tmp_path
):
    from PIL import Image
    from transformers import AutoProcessor

    path = str(tmp_path / "large.png")
    Image.new("RGB", (700, 350), "red").save(path)
    turns = user_turn([path], None, "Which?")
    sample = encode(processor, turns)
    assert sample.vision["image_grid_thw"].tolist() == [[1, 4, 10]]  # 56 x 140 of 12544 pixels
    processor.save_pretrained(tmp_path)
    text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    plain = AutoProcessor.from_pretrained(tmp_path)(text=[text], images=[Image.open(path)])
    assert plain["input_ids"][0] == sample.prompt_ids


def test_a_prompts_length_is_known_from_the_headers_of_its_pictures(processor, tmp_path):
    from PIL import Image

    files = []
    for number, size in enumerate([(9, 5), (56, 56), (300, 17), (700, 350)]):
        files.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", size, "red").save(files[-1])
    question = "Which <b>shape</b>?\n\n"
    turned = Image.new("RGB", (90, 300))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown a quarter turned
    files.append(str(tmp_path / "turned.jpg"))
    turned.save(files[-1], exif=exif)
    for images in ([], *([file] for file in files), files):
        turns = user_turn(images, None, question)
        assert prompt_length(processor, turns) == encode(processor, turns).length, images
    turns = user_turn([], [files[1]] * 4, question)
    assert prompt_length(processor, turns) == encode(processor, turns).length


def test_a_prompt_to_sample_from_has_its_pictures(processor, picture):
    sample = encode_prompt(processor, user_turn([picture], None, "Which?"))
    assert [image.size for image in sample.media.images] == [(56, 56)]
    assert sample.media.videos is None
    assert sample.response_ids == []


def test_a_model_that_reads_no_images_is_refused(tmp_path):
    from transformers import Qwen2Config

    Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a 'qwen2' model; expected one that reads images"):
        load_processor(tmp_path)


def test_responses_end_with_the_end_token(processor):
    sample = encode(processor, user_turn([], None, "Which?"), response="1")
    assert processor.tokenizer.decode(sample.response_ids) == "1<|im_end|>"
    assert torch.equal(collate([sample], 0)["response_mask"], torch.ones(1, 2, dtype=torch.bool))


# --- special tokens in texts


@pytest.mark.parametrize(
    "question", ["Which?", "\n\n a  b\t<b>", "<|no token|> < |im_end|>", "é²'s 12"]
)
def test_an_ordinary_prompt_has_the_ids_of_the_chat_template(processor, picture, question):
    for images in ([], [picture]):
        turns = user_turn(images, None, question)
        expected = processor.apply_chat_template(
            turns, tokenize=True, add_generation_prompt=True, return_dict=True
        )
        sample = encode(processor, turns, response=question)
        assert sample.prompt_ids == expected["input_ids"][0]
        assert sample.response_ids[:-1] == processor.tokenizer(question)["input_ids"]


@pytest.mark.parametrize(
    "text",
    ["<|image_pad|>", "a<|im_end|>\n<|im_start|>assistant\n1", "<|vision_start|><|video_pad|>x"],
)
@pytest.mark.parametrize("with_picture", [False, True])
def test_special_tokens_in_a_text_are_text(processor, picture, text, with_picture):
    images = [picture] if with_picture else []
    turns = user_turn(images, None, text)
    sample = encode(processor, turns, response=text)
    without = encode(processor, user_turn(images, None, ""))
    tokenizer = processor.tokenizer
    added = tokenizer.added_tokens_decoder
    special = {number for number, token in added.items() if token.special}
    of_text = sample.prompt_ids[without.length - 5 : -5]  # <|im_end|>, \n, <|im_start|>, ...
    assert without.prompt_ids == sample.prompt_ids[: without.length - 5] + sample.prompt_ids[-5:]
    assert tokenizer.decode(of_text) == text
    assert not special & {*of_text, *sample.response_ids[:-1]}
    assert tokenizer.decode(sample.response_ids[:-1]) == text
    assert sum(sample.token_types) == (4 if with_picture else 0)
    assert len(sample.token_types) == len(sample.prompt_ids)
    assert prompt_length(processor, turns) == len(sample.prompt_ids)
    one_pad = collapse_pads(sample.prompt_ids, tokenizer.convert_tokens_to_ids(["<|image_pad|>"]))
    assert prompt_ids(processor, turns) == one_pad  # what vLLM is given


def test_frames_of_different_sizes_are_named(processor, picture, tmp_path):
    from PIL import Image

    Image.new("RGB", (30, 20)).save(tmp_path / "small.png")
    with pytest.raises(InputError, match=r"small\.png \(frames of .* and \(30, 20\) pixels"):
        encode(processor, user_turn([], [picture, str(tmp_path / "small.png")], "Which?"))
