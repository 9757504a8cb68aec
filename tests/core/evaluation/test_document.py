import pytest

from core_jax.evaluation.document import replace_part


def test_what_stands_between_the_marks_is_replaced():
    assert replace_part("a <b> old <e> z", "<b>", "<e>", "new\n") == "a <b>\n\nnew\n\n<e> z"
    again = replace_part("a <b>\n\nnew\n\n<e> z", "<b>", "<e>", "new")
    assert again == "a <b>\n\nnew\n\n<e> z"


@pytest.mark.parametrize("document", ["text", "<b> text", "text <e>", "<e> text <b>"])
def test_a_document_without_the_marks_is_refused(document):
    with pytest.raises(ValueError, match="needs <b> and <e>"):
        replace_part(document, "<b>", "<e>", "new")
