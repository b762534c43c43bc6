"""The parser and the comparison that the tests of documents rest on."""

import pytest

from tests.docs.markdown import Text, blocks_of, commands_of, first_broken_promise

PAGE = """\
# Page

## Part
<!-- run by: ops -->

```shell
a
```

### Inner

<!-- not run: it would take hours -->
```console
$ one
out
$ two \\
  three
$ cat <<X
> text
> X
```

## Other

```python
print(1)
```

```text
1
```

```python
print(2)
```

prose

```text
no promise
```
"""


def test_marks_hold_for_their_block_or_their_section():
    blocks = blocks_of("page.md", PAGE)
    assert [block.language for block in blocks] == ["shell", "console", "python", "python", "text"]
    assert [block.mark and block.mark.kind for block in blocks] == ["run by", "not run", None, None, None]
    assert blocks[0].place == "page.md:7"


def test_output_is_the_block_directly_below_a_program():
    blocks = blocks_of("page.md", PAGE)
    assert [block.promised and block.promised.lines for block in blocks[2:]] == [("1",), None, None]


def test_console_splits_into_commands_with_their_output():
    commands = commands_of(blocks_of("page.md", PAGE)[1])
    assert [command.text for command in commands] == ["one", "two \\\n  three", "cat <<X\ntext\nX"]
    assert [command.promised.lines for command in commands] == [("out",), (), ()]
    assert commands[0].line == 14


@pytest.mark.parametrize(
    ("promised", "printed", "broken_at"),
    [
        (("a", "b"), "a\nb\n", None),
        (("a …", "b"), "a 12\nb", None),
        (("…", "b"), "x\ny\nb\n", None),
        (("a", "…"), "a\n", None),
        (("a", "…", "b"), "a\nb\nc\nb\n", None),
        (("a", "c"), "a\nb\n", 11),
        (("a",), "a\nb\n", 11),
        (("a", "b"), "a\n", 11),
        (("a.",), "ab\n", 10),
    ],
)
def test_ellipsis_stands_for_any_text(promised, printed, broken_at):
    assert first_broken_promise(Text(line=10, lines=promised), printed) == broken_at
