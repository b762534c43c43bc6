"""News text is found in or beside a corpus."""

import gzip

import pytest

from bench.shared.corpus import find_news


@pytest.mark.parametrize(
    "name", ["news.en", "news/test.en", "news/news.en", "../news/test.en", "../news.en", "news.en.gz"]
)
def test_news_is_found_in_and_beside_the_folder(tmp_path, name):
    data = tmp_path / "corpus"
    data.mkdir()
    path = data / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(b"some news\n") if name.endswith(".gz") else b"some news\n")
    news = find_news(data, "en", "de")
    assert (list(news.sentences), news.training.source) == (["some news"], ())
    assert news.described == str(news.test)


def test_missing_news_is_reported(tmp_path):
    (tmp_path / "news.de").write_text("Nachrichten\n")
    news = find_news(tmp_path, "en", "de")
    assert (news.test, news.sentences, news.training.target) == (None, (), ())
    assert news.described == "none found: the sentences of the test set alone"


def test_training_pairs_of_news_have_requested_languages(tmp_path):
    (tmp_path / "news").mkdir()
    for language in ("en", "fr"):
        (tmp_path / f"news/train.{language}").write_text(f"{language}\n")
    assert list(find_news(tmp_path, "en", "fr").training.target) == ["fr"]
    assert find_news(tmp_path, "en", "de").training.target == ()
