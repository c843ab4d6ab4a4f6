"""What judges write that were not trained to our format, what a person reads, and --parse."""

import dataclasses
import doctest
import json

import pytest
from evaluation import args_of, judged, make_row, score, value

import evaluate
from core import lenient
from core.files import Journal
from core.judge_in_python import Judge
from core.judgements import Protocol, judgements_file
from core.lenient import lenient_choice
from stable_reinforce import parse

THOUGHT = "<think>Response 1 names the colour. Response 2 is better at first sight.</think>"

LETTERS = "<think>Assistant A names the colour, B does not.</think>"

# what a judge wrote, what a person reads: 1, 2, or None where nobody could say
OUTPUTS = [
    # tags
    ("<think>Red.</think><answer>1</answer>", 1),
    ("<think>Red.</think><answer>2</answer>", 2),
    ("<think>Red.</think>\n<answer> 2 </answer>\n", 2),
    ("<answer>1</answer>", 1),
    ("<answer>2", 2),
    (THOUGHT + "<answer>1", 1),
    (THOUGHT + "<answer>Response 1</answer>", 1),
    (THOUGHT + "<answer>Response 2</answer>", 2),
    (THOUGHT + "<answer>response 2.</answer>", 2),
    (THOUGHT + "<answer>[1]</answer>", 1),
    (THOUGHT + "<answer>(2)</answer>", 2),
    (THOUGHT + "<answer>**1**</answer>", 1),
    (THOUGHT + "<answer>`2`</answer>", 2),
    (THOUGHT + '<answer>"1"</answer>', 1),
    (THOUGHT + "<answer>2.</answer>", 2),
    (THOUGHT + "<answer>Response 1 is better</answer>", 1),
    (THOUGHT + "<answer>Response 2 is better.</answer>", 2),
    (THOUGHT + "<answer>1 is better than 2</answer>", 1),
    (THOUGHT + "<answer>Answer 2</answer>", 2),
    (LETTERS + "<answer>Assistant B</answer>", 2),
    (LETTERS + "<answer>A</answer>", 1),
    (LETTERS + "<answer>B</answer>", 2),
    (THOUGHT + "<answer>The first response</answer>", 1),
    (THOUGHT + "<answer>the second one</answer>", 2),
    (THOUGHT + "<answer>１</answer>", 1),
    (THOUGHT + "<answer>２</answer>", 2),
    (THOUGHT + "<answer>②</answer>", 2),
    (THOUGHT + r"<answer>\boxed{2}</answer>", 2),
    (THOUGHT + "<answer>$1$</answer>", 1),
    (THOUGHT + "<answer>#2</answer>", 2),
    (THOUGHT + "<answer>1/2</answer>", None),
    (THOUGHT + "<answer>1 or 2</answer>", None),
    (THOUGHT + "<answer>3</answer>", None),
    (THOUGHT + "<answer></answer>", None),
    (THOUGHT + "<answer>tie</answer>", None),
    (THOUGHT + "<answer>Both are equally good</answer>", None),
    (THOUGHT + "<answer>Neither response is better</answer>", None),
    (THOUGHT + "<answer>12</answer>", None),
    (THOUGHT + "<answer>1.5</answer>", None),
    (THOUGHT + "<answer>two cars</answer>", None),
    # boxes and brackets
    (r"The first is right. \boxed{1}", 1),
    (r"So the verdict is $\boxed{2}$.", 2),
    (r"\boxed{\text{Response 1}}", 1),
    (r"$$\boxed{\text{Response 2}}$$", 2),
    (LETTERS + r"\boxed{B}", 2),
    (r"\boxed{3}", None),
    (r"\boxed{1} or \boxed{2}", None),
    ("[[A]]", 1),
    ("[[B]]", 2),
    ("Assistant A sees the dog, B does not.\n\n[[A]]", 1),
    ("My final verdict is: [[B]]", 2),
    ("My final verdict is: [[a]]", 1),
    ("[[1]]", 1),
    ("[[2]]", 2),
    ("[[C]]", None),
    ("[[A]] or [[B]]", None),
    ("Choose [[A]] if A is better, [[B]] if B is better.", None),
    # a last line, bold
    ("1", 1),
    ("2", 2),
    ("2.", 2),
    (" 1\n", 1),
    ("**1**", 1),
    ("The count is right in the second.\n**2**", 2),
    ("Response 1", 1),
    ("Response 2.", 2),
    ("**Response 2**", 2),
    ("Assistant B", 2),
    ("Both name the colour, the first also the shape.\n\n1", 1),
    ("Both name the colour.\n\nAnswer: 2", 2),
    ("Both name the colour.\n\n**Answer:** 1", 1),
    ("Both name the colour.\n\nAnswer: Response 1", 1),
    ("Both name the colour.\n\nFinal answer: 2", 2),
    ("Both name the colour.\n\n### Final Answer: Response 2", 2),
    ("Both name the colour.\n\n**Final Answer**: 1", 1),
    ("Final answer: 1\n\nBoth name the colour.", 1),
    ("My answer is 2.", 2),
    ("My answer: Response 1.", 1),
    ("Final verdict: 2", 2),
    ("**Final Verdict:** Response 1", 1),
    ("Final decision: Response 2", 2),
    ("Verdict: 1", 1),
    ("Choice: 2", 2),
    ("My choice is Response 1.", 1),
    ("Judgment: Response 2", 2),
    ("Judgement: Response 2", 2),
    ("Winner: Response 1", 1),
    ("The winner is Response 2.", 2),
    ("Preference: 1", 1),
    ("Conclusion: Response 2", 2),
    ("Therefore, the final verdict is 2.", 2),
    ("Better response: 1", 1),
    ("The better response is Response 2.", 2),
    ("The best answer is Answer 1.", 1),
    ("Preferred response: Response 2", 2),
    ("Overall better response: 1", 1),
    # sentences
    ("Response 1 is better.", 1),
    ("Response 2 is better.", 2),
    ("response 2 is better", 2),
    ("**Response 1** is better.", 1),
    ("Answer 1 is better than Answer 2.", 1),
    ("Response B is better.", 2),
    ("Assistant A is better than Assistant B.", 1),
    ("Model 2 is superior.", 2),
    ("Response (1) is preferable.", 1),
    ("Response #2 is preferred.", 2),
    ("Response 1 is clearly the better one.", 1),
    ("Response 2 is the better response.", 2),
    ("Response 2 is slightly better, because it names the shape.", 2),
    ("Response 1 is significantly better than Response 2 in every respect.", 1),
    ("Response 1 seems better.", 1),
    ("Response 2 appears to be better.", 2),
    ("Response 2 is the best.", 2),
    ("Response 1 wins.", 1),
    ("Response 2 outperforms Response 1.", 2),
    ("Response 1 is the clear winner.", 1),
    ("Response 2 should be preferred.", 2),
    ("Response 1 should be chosen.", 1),
    ("I prefer Response 2.", 2),
    ("I would choose Response 1.", 1),
    ("I choose Response 2 because it is right.", 2),
    ("I'd go with Response 1.", 1),
    ("I pick answer 2.", 2),
    ("I favour the second response.", 2),
    ("I favor Response 1 over Response 2.", 1),
    ("The first response is better.", 1),
    ("The second answer is better than the first.", 2),
    ("The second one is better.", 2),
    ("Response 2 is worse than Response 1.", 1),
    ("Response 1 is worse.", 2),
    ("Response 1 is inferior to Response 2.", 2),
    ("Response 2 does not see the car, so Response 1 is better.", 1),
    ("Response 1 is better since Response 2 is not true to the picture.", 1),
    ("Response 1 is better. It names the colour. Response 1 wins.", 1),
    ("In detail Response 1 is better. Overall, Response 2 is better.", 2),
    ("Response 1 is better in style; however, overall Response 2 is better.", 2),
    ("Response 2 is better in clarity. Therefore, I choose Response 1.", 1),
    ("Is Response 1 better? No. Response 2 is better.", 2),
    ("Thus, Response 2 is better.", 2),
    ("While Response 1 is longer, Response 2 is better.", 2),
    ("Although Response 2 is fluent, Response 1 is better.", 1),
    ("Response 1: a red car.\nResponse 2: a blue car.\nThe car is blue. Response 2 is better.", 2),
    # nobody could say, or only by guessing
    ("", None),
    ("Both responses are good.", None),
    ("It is a tie.", None),
    ("Response 1 is as good as Response 2.", None),
    ("Response 1 is not better.", None),
    ("I do not think that Response 1 is better.", None),
    ("I don't prefer Response 2.", None),
    ("Neither Response 1 nor Response 2 is better.", None),
    ("If Response 1 is better, say 1.", None),
    ("Whether Response 2 is better depends on taste.", None),
    ("Is Response 2 better?", None),
    ("Response 1 might be better.", None),
    ("Response 1 is better. Response 2 is better.", None),
    ("Response 1 is better in detail. Response 2 is better in style.", None),
    ('Output "1" if Response 1 is better; Output "2" if Response 2 is better.', None),
    ("<think>Your detailed comparative analysis</think><answer>1/2</answer>", None),
    ("The answer is 2.", None),
    ("There are 2 cars, so the correct answer is 2.", None),
    ("The correct answer is B.", None),
    ("The correct answer is A. Response 2 says A. Response 2 is better.", 2),
    ("There is 1 car. Response 2 says so. I choose Response 2.", 2),
    ("**Response 1:** a red car\n**Response 2:** a blue car", None),
    ("Response 1 says there are 2 dogs.", None),
    ("Response 3 is better.", None),
    ("Response 12 is better.", None),
    ("I cannot help with that.", None),
    # a thought that was never closed has no verdict, whatever stands in it
    ("<think>Response 1 is better", None),
    ("<think>a</think><think>[[A]]", None),
    # a letter may be an option of the question, where the answers are called by numbers
    (THOUGHT + "<answer>A</answer>", None),
    (THOUGHT + "<answer>Option B</answer>", None),
    (r"Response 2 chooses the right option. \boxed{B}", None),
    (r"\boxed{B}", None),
    ("Answer B", None),
    ("The best answer is B.", None),
    ("The correct option is B, so Response 1 is better.", 1),
    ("Response 1 chooses B, the best option. Therefore, I choose Response 1.", 1),
    # digits of other scripts, tags and thoughts of other models
    (THOUGHT + "<answer>٢</answer>", 2),
    (THOUGHT + "<answer>१</answer>", 1),
    (THOUGHT + "<answer>回答2</answer>", 2),
    ("最终选择：2", 2),
    ("Final verdict：２", 2),
    ("<thinking>Response 1 is better.</thinking>\nResponse 2 is better.", 2),
    ("<thinking>Response 1 is better.", None),
    ("Response 1 is better.</think>Final verdict: 2", 2),
    ("Response 1 is better.</think>", None),
    (THOUGHT + "<Answer>2</Answer>", 2),
    (THOUGHT + "<answer>-1</answer>", None),
    (THOUGHT + "<answer>2 is worse</answer>", 1),
    (THOUGHT + "<answer>not 1</answer>", None),
    (THOUGHT + "<answer>1, not 2</answer>", 1),
    (THOUGHT + "<answer>Verdict: 2</answer>", 2),
    (THOUGHT + "<answer>1</answer><answer>tie</answer>", None),
    (THOUGHT + "<answer>Response 1 is better in style, Response 2 in detail</answer>", None),
    # JSON
    ('{"verdict": 2}', 2),
    ('{"reasoning": "Response 2 is better in style.", "verdict": "1"}', 1),
    ('```json\n{"choice": "Response 2"}\n```', 2),
    ('{"better_response": 1, "confidence": 2}', 1),
    ('{"winner": "tie"}', None),
    ('{"final_verdict": "Response 1 is better"}', 1),
    ('{"answer": 2}', 2),
    ('{"score_1": 8, "score_2": 6}', None),
    # comparisons and tables
    ("Answer 1 > Answer 2", 1),
    ("Overall: Response 2 >> Response 1", 2),
    ("Response 1 < Response 2", 2),
    (THOUGHT + "<answer>1 > 2</answer>", 1),
    ("Colour: Response 1 > Response 2\nShape: Response 2 > Response 1", None),
    ("Response 1 = Response 2", None),
    ("| criterion | 1 | 2 |\n|---|---|---|\n| colour | 8 | 6 |\n\n| Verdict | Response 1 |", 1),
    ("| **Winner** | 2 |", 2),
    ("| criterion | better |\n| colour | 1 |\n| shape | 2 |\n| **Final verdict** | **2** |", 2),
    ("**1.** Colour: both see it.\n**2.** Shape: neither.\nResponse 2 is better.", 2),
    ("1. Response 1 is a list.\n2. Response 2 is none.", None),
    # who says what of whom
    ("Response 2 compared to Response 1 is better.", 2),
    ("Response 2, unlike Response 1, is better.", 2),
    ("Nothing in Response 1 is better.", None),
    ("The wording of Response 1 is better.", None),
    ("Some would say that Response 1 is better.", None),
    ("It is tempting to prefer Response 1.", None),
    ("People prefer Response 1.", None),
    ("Response 1 could be better.", None),
    ("Response 1 would be better with the colour.", None),
    ("Response 1 is better supported by the picture, Response 2 is not.", None),
    ("Response 1 is better in style.", None),
    ("Response 2 is better at counting.", None),
    ("Response 2 is no better than Response 1.", None),
    ("Even if Response 1 is longer, Response 2 is right.", None),
    ("Response 2 is wrong and Response 1 is better.", 1),
    ("Response 2 is better - it sees the dog.", 2),
    ("The better one here is Response 1.", 1),
    ("We select Response 2.", 2),
    ("I am going with Response 2.", 2),
    ("I’d pick Response 1.", 1),
    ("Response 2 is better, in my opinion.", 2),
    ("I believe Response 2 is better.", 2),
    ("Response 1 loses to Response 2.", 2),
    ("The latter is better than the former.", 2),
    # a tie, and verdicts that contradict each other
    ("Response 1 is better in every way. Final verdict: tie.", None),
    ("Response 1 is better. [[C]]", None),
    ("Response 1 is better. Still, it is a tie.", None),
    ("Overall, both are equally good. Response 1 is better.", None),
    ("A tie is not permitted. Response 2 is better.", 2),
    ("Verdict: 1\nOverall, Response 2 is better.", None),
    ("Verdict: 1\nVerdict: 2", None),
    ("**Colour winner:** Response 1\n**Final verdict:** Response 2", 2),
    ("[[A]]\n\nOverall, Assistant B is better.", None),
    (r"Response 1 is better. \boxed{2}", 2),
    ("Response 2 is better.\n\n1", 1),
    ("### Conclusion\nResponse 2 is better.", 2),
    ("Conclusion: Response 2 is better because it sees the dog.", 2),
    ("Overall Judgment: Answer 2 is better.", 2),
    ("**Overall Judgment**: **Answer 1** is slightly better.", 1),
    ("Answer 1 is better in clarity. Overall Judgment: Answer 2 is the better answer.", 2),
]


def test_there_are_enough_outputs():
    assert len(OUTPUTS) >= 250
    assert len(dict(OUTPUTS)) == len(OUTPUTS)


@pytest.mark.parametrize(("text", "person"), OUTPUTS)
def test_neither_reader_reads_the_other_answer(text, person):
    assert parse(text).choice in (None, person)
    assert lenient_choice(text) in (None, person)


def test_the_lenient_reader_reads_nearly_all_that_a_person_reads():
    clear = [(text, person) for text, person in OUTPUTS if person is not None]
    missed = [text for text, person in clear if lenient_choice(text) is None]
    assert len(missed) <= 0.05 * len(clear), missed


def test_doctests():
    assert doctest.testmod(lenient).failed == 0


# --- evaluate.py --parse lenient

STRICT, LENIENT = (Protocol("both", 4, parse=reading) for reading in ("strict", "lenient"))


def in_words(row, order, sample):
    """Right, in words; every fourth row has no verdict, the next one that of the format."""
    better = 3 - row.choice if order else row.choice
    texts = {0: "I cannot tell.", 1: f"<answer>{better}</answer>"}
    logps = {"logp1": -0.1 * better, "logp2": -0.1} if row.row % 4 == 1 else {}
    return {"text": texts.get(row.row % 4, f"Response {better} is better.")} | logps


def test_kept_texts_are_read_again_and_the_file_stays_as_it_is(tmp_path, capsys):
    rows = [make_row(i) for i in range(8)]
    args = args_of("--samples", 4, "--out", tmp_path)
    evaluate.check_or_write_config(args, {"pairs": rows}, {})
    with Journal(judgements_file(tmp_path)) as journal:
        done = judged(rows, STRICT, in_words)
        journal.append([dataclasses.asdict(judgement) for judgement in done.values()])
    kept = judgements_file(tmp_path).read_bytes()
    for reading, overall in (("strict", 25), ("lenient", 75)):
        evaluate.main(["--score_only", "--parse", reading, "--out", str(tmp_path)])
        results = json.loads((tmp_path / "results.json").read_text())
        result = results["benches"]["pairs"]
        assert results["args"]["parse"] == reading
        assert value(result, "one sample") == overall
        assert result["about"]["no verdict"] == 100 - overall
        printed = capsys.readouterr().out
        assert "no verdict if read strictly: 75.0; no verdict if read leniently: 25.0" in printed
        assert ("verdicts read leniently" in printed) == (reading == "lenient")
    assert judgements_file(tmp_path).read_bytes() == kept


def test_early_stopping_stops_by_the_verdicts_as_they_are_read():
    early = Protocol("both", samples=16, early_stop=True, parse="lenient")
    rows = [make_row(2)]
    assert len(judged(rows, early, in_words)) == 3
    assert len(judged(rows, dataclasses.replace(early, parse="strict"), in_words)) == 16


def test_a_verdict_in_words_weighs_as_much_as_the_mean_of_the_others():
    """It has no log-probability: calibrated votes do without it."""
    rows = [make_row(i) for i in range(1, 4)]
    result = score(rows, LENIENT, in_words)
    assert value(result, "voting@4") == value(result, "confidence-weighted@4") == 100
    assert result["about"]["verdicts without log-probability"] == 8
    assert value(result, "calibrated@4") < 100


@pytest.mark.parametrize("fields", [{"finish": "length"}, {"logp1": -0.7, "logp2": -0.7}])
def test_what_was_cut_off_and_equal_rewards_are_not_read_leniently(fields):
    text = "Response 1 is better."
    (judgement,) = judged([make_row(0)], Protocol("dataset", 1), lambda *_: {"text": text}).values()
    assert judgement.lenient_choice == 1
    assert dataclasses.replace(judgement, **fields).lenient_choice is None


def test_the_judge_in_python_reads_as_it_is_told():
    class InWords:
        def answer(self, jobs):
            while jobs:
                job = jobs.popleft()
                texts = [f"Response {1 + job.order} is better."] * job.count
                yield job, [job.judgement(number, text) for number, text in enumerate(texts)]

    assert Judge(InWords(), STRICT)("Q", [], "a", "b").votes == (0, 0, 4)
    assert Judge(InWords(), LENIENT)("Q", [], "a", "b").votes == (4, 0, 0)
