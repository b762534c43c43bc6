import pytest

from ferryman_service.domain.language_tags import language_tag_violation

WELL_FORMED = ["en", "DE", "yue", "zh-Hans", "pt-BR", "es-419", "sr-Latn-RS", "sl-rozaj-biske", "de-CH-1996", "xx"]
LONGER = ["zh-cmn-Hans-CN", "en-a-myext-b-another", "de-DE-u-co-phonebk", "en-x-private", "x-elvish"]
MEANT = {"english": "en", "German": "de", "français": "fr", " en": "en", "pt_BR": "pt-BR", "en_US.UTF-8": "en-US"}
NO_TAGS = ["", "e", "enge", "klingon", "i-klingon", "en-", "en-US-GB", "x", "en-x", "eñ", "a/b", "ſk"]


@pytest.mark.parametrize("tag", WELL_FORMED + LONGER)
def test_well_formed_tags_are_accepted(tag):
    assert language_tag_violation(tag) is None


@pytest.mark.parametrize(("tag", "meant"), MEANT.items())
def test_the_tag_that_is_meant_is_named(tag, meant):
    assert language_tag_violation(tag).endswith(f'write "{meant}"')


@pytest.mark.parametrize("tag", NO_TAGS)
def test_malformed_language_tag_is_refused(tag):
    assert "such as" in language_tag_violation(tag)


def test_a_long_tag_is_shown_in_part():
    assert len(language_tag_violation("x" * 10_000)) < 200
