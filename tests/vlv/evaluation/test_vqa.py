"""Text-only question answering: prompts, answers, ceilings."""

import pytest

from vlv_jax.evaluation.answers import exact_match, normalise_answer, vqa_accuracy
from vlv_jax.evaluation.vqa import (
    PromptFormat,
    Question,
    Shot,
    answer_questions,
    choose_shots,
    compare_captions,
    first_line,
)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Red circle.", "red circle"),
        (" two\n", "2"),
        ("None", "0"),
        ("an apple, a pear", "apple pear"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("black/white", "black white"),
        ("t-shirt", "t shirt"),
        ("dont know", "don't know"),
        ("yes!", "yes"),
        ("left of (it)", "left of it"),
        ("", ""),
    ],
)
def test_normalise_answer(answer, normal):
    assert normalise_answer(answer) == normal


def test_accuracies():
    assert exact_match("A red one.", ["Blue", "red 1"]) == 1
    assert exact_match("red", ["blue"]) == 0
    assert vqa_accuracy("red", ["red"] * 10) == 1
    # Three of ten: left out in turn, three times 2/3 and seven times 1.
    assert vqa_accuracy("red", ["red"] * 3 + ["blue"] * 7) == pytest.approx(0.9)
    assert vqa_accuracy("red", ["red"] + ["blue"] * 9) == pytest.approx(0.3)
    assert vqa_accuracy("red", ["Red."]) == 1


def test_prompt_is_written_as_documented():
    prompt = PromptFormat(instruction="Answer.").prompt(
        "a {red}\ncircle ", "What colour?", [Shot(caption="a dog", question="Cat?", answer="no")]
    )
    assert prompt == (
        "Answer.\n\nImage: a dog\nQuestion: Cat?\nAnswer: no"
        "\n\nImage: a {red} circle\nQuestion: What colour?\nAnswer:"
    )
    assert PromptFormat(instruction="").prompt("a", "b").startswith("Image: a\n")


def test_text_in_captions_is_never_a_template():
    prompt = PromptFormat(instruction="").prompt("see {question}", "why?")
    assert prompt == "Image: see {question}\nQuestion: why?\nAnswer:"


def test_first_line():
    assert first_line("\n  red \nQuestion: more?") == "red"
    assert first_line(" yes\r\nQuestion: more?\nAnswer: no") == "yes"
    assert first_line("two") == "two"
    assert first_line(" \n ") == ""


def test_more_shots_extend_fewer():
    pool = [Shot(caption=str(i), question="q", answer="a") for i in range(20)]
    assert choose_shots(pool, 8, seed=1)[:4] == choose_shots(pool, 4, seed=1)
    assert choose_shots(pool, 8, seed=1) != choose_shots(pool, 8, seed=2)
    with pytest.raises(ValueError, match="21 shots from a pool of 20"):
        choose_shots(pool, 21)


QUESTIONS = [
    Question(image="1", question="What colour is it?", answers=("red",), kind="colour"),
    Question(image="1", question="Is it big?", answers=("yes",), kind="size"),
    Question(image="2", question="What colour is it?", answers=("blue",), kind="colour"),
]


def _reader(prompts):
    """Reads the colour off the caption; says yes to everything else."""
    answers = []
    for prompt in prompts:
        caption, question = prompt.rsplit("Image: ", 1)[1].split("\n")[:2]
        colours = [w for w in caption.split() if w in ("red", "blue")]
        colour = colours[0] if colours else "green"
        answers.append(f" {colour if 'colour' in question else 'Yes'}\nQuestion: next?")
    return answers


def test_answers_by_kind_and_batch():
    calls = []

    def counting(prompts):
        calls.append(len(prompts))
        return _reader(prompts)

    result = answer_questions(
        counting, QUESTIONS, {"1": "a red one", "2": "a red one"}, batch_size=2, num_resamples=50
    )
    assert calls == [2, 1]
    assert result.answers == ["red", "Yes", "red"]
    assert result.correct == [1, 1, 0]
    assert result.accuracy.value == pytest.approx(2 / 3)
    assert result.accuracy.n == 2  # images, not questions
    assert {k: e.value for k, e in result.by_kind.items()} == {"colour": 0.5, "size": 1.0}


def test_ceiling_and_floor():
    sets = {"vlv": {"1": "red", "2": "red"}, "true": {"1": "a red one", "2": "a blue one"}}
    results = compare_captions(_reader, QUESTIONS, sets, num_resamples=50)
    values = {name: round(r.accuracy.value, 3) for name, r in results.items()}
    assert values == {"vlv": 0.667, "true": 1.0, "no_caption": 0.333}


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"1 images have questions but no caption: \['2'\]"):
        answer_questions(_reader, QUESTIONS, {"1": "a"})
    with pytest.raises(ValueError, match="returned 1 answers to 3"):
        answer_questions(lambda prompts: ["x"], QUESTIONS, {"1": "a", "2": "b"})
    with pytest.raises(ValueError, match="unknown metric"):
        answer_questions(_reader, QUESTIONS, {"1": "a", "2": "b"}, metric="bleu")
    with pytest.raises(ValueError, match="no questions"):
        answer_questions(_reader, [], {})
