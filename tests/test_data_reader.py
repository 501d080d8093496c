"""Rows of every form are read as their record, and hostile files give one clear line or a row in the ledger."""

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax.data.dialogues import Message, render_prompt
from rlhf_jax.data.jsonl import MAX_LINE_BYTES
from rlhf_jax.data.ledger import Ledger
from rlhf_jax.data.reader import Kind, read_records
from rlhf_jax.data.records import Comparison, Demonstration, Dialogue, Prompt, Ranking, Record, Text
from rlhf_jax.errors import UserError
from tests.cases import case

pytestmark = pytest.mark.core

HH = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: why\n\nAssistant:"
USER = {"role": "user", "content": "q"}
CHAT_PROMPT = "\n\nHuman: q\n\nAssistant:"


DIALOGUE = Dialogue((Message("user", "q"), Message("assistant", "x")))


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """read(kind, rows or bytes) -> (records, ledger), from a file data.jsonl."""

    def read_file(kind: Kind, content: list[Any] | bytes) -> tuple[list[Record], Ledger]:
        path, ledger = tmp_path / "data.jsonl", Ledger()
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content).encode()
        path.write_bytes(content)
        return list(read_records([path], kind, ledger)), ledger

    return read_file


FORMS = [
        ("text", {"text": "a\u2028b\n"}, Text("a\u2028b\n")),
        ("text", {"messages": [USER, says("x")]}, Text("\n\nHuman: q\n\nAssistant: x")),
        ("text", {"text": "", "messages": [USER, says("x")]}, Text("\n\nHuman: q\n\nAssistant: x")),
        ("text", {"text": "a", "messages": [], "train": True, "tools": ["x"]}, Text("a")),
        ("demonstrations", {"prompt": "p", "completion": "c", "more": [None]}, Demonstration("p", "c")),
        ("demonstrations", {"prompt": "", "response": "c"}, Demonstration("", "c")),
        ("demonstrations", {"prompt": [USER], "completion": [says("c")]}, Demonstration(CHAT_PROMPT, " c")),
        ("demonstrations", {"messages": [USER, says("x")]}, DIALOGUE),
        ("demonstrations", {"prompt": "q", "messages": [USER, says("x")]}, DIALOGUE),
        ("dialogues", {"messages": [USER, says("x")]}, DIALOGUE),
        ("comparisons", {"prompt": "p", "chosen": "c", "rejected": "r"}, Comparison("p", "c", "r")),
        ("comparisons", {"prompt": [USER], "chosen": [says("c")], "rejected": [says("r")]},
         Comparison(CHAT_PROMPT, " c", " r")),
        ("comparisons", {"chosen": [USER, says("c")], "rejected": [USER, says("r")]},
         Comparison(CHAT_PROMPT, " c", " r")),
        (
            "comparisons",
            {"prompt": "q", "chosen": [USER, says("c")], "rejected": [USER, says("r")]},
            Comparison(CHAT_PROMPT, " c", " r"),
        ),
        ("comparisons", {"chosen": HH + " a", "rejected": HH + " b"}, Comparison(HH, " a", " b")),
        ("comparisons", {"prompt": "", "chosen": HH + " a", "rejected": HH + " b"}, Comparison(HH, " a", " b")),
        ("comparisons", {"prompt": HH, "chosen": HH + " a", "rejected": HH + " b"}, Comparison(HH, " a", " b")),
        ("comparisons", {"prompt": HH, "chosen": " a", "rejected": " b"}, Comparison(HH, " a", " b")),
        ("rankings", {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [5, 1, 5]},
         Ranking("p", ("a", "b", "c"), (2, 1, 2))),
        ("comparisons", {"prompt": "p", "responses": ["a", "b"], "ranks": [2, 1]}, Ranking("p", ("a", "b"), (2, 1))),
        ("rankings", {"prompt": [USER], "responses": ["a", [says("b")]], "ranks": [2, 1]},
         Ranking(CHAT_PROMPT, (" a", " b"), (2, 1))),
        ("rankings", {"prompt": "p", "chosen": "c", "rejected": "r"}, Comparison("p", "c", "r")),
        ("demonstrations", {"prompt": "p", "completion": "c", "ended": False}, Demonstration("p", "c", ended=False)),
        ("demonstrations", {"prompt": "p", "completion": "c", "ended": None}, Demonstration("p", "c")),
        ("dialogues", {"messages": [USER, says("x")], "ended": True}, DIALOGUE),
        ("comparisons", {"prompt": "p", "chosen": "c", "rejected": "r", "ended_rejected": False},
         Comparison("p", "c", "r", ended=(True, False))),
        ("comparisons", {"chosen": HH + " a", "rejected": HH + " b", "ended_chosen": False, "ended_rejected": True},
         Comparison(HH, " a", " b", ended=(False, True))),
        ("comparisons", {"prompt": "p", "chosen": "c", "rejected": "r", "ended_chosen": True, "ended_rejected": None},
         Comparison("p", "c", "r")),
        ("rankings", {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 2, 2], "ended": [True, False, True]},
         Ranking("p", ("a", "b", "c"), (1, 2, 2), ended=(True, False, True))),
        ("rankings", {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "ended": [True, True]},
         Ranking("p", ("a", "b"), (1, 2))),
        ("rankings", {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "ended": None},
         Ranking("p", ("a", "b"), (1, 2))),
        ("prompts", {"prompt": "p"}, Prompt("p")),
        ("prompts", {"prompt": [USER]}, Prompt(CHAT_PROMPT)),
        ("prompts", {"chosen": HH + " a", "rejected": HH}, Prompt(HH)),
        ("prompts", {"messages": [USER, says("x")]}, Prompt(CHAT_PROMPT)),
    ]  # fmt: skip


def test_every_form_of_row(read: Any) -> None:
    for one in FORMS:
        with case(one) as (kind, row, record):
            (found,), ledger = read(kind, [row])
            if not isinstance(found, Text | Dialogue):
                # Whatever came as messages or as a transcript keeps its turns; plain text has none.
                plain = isinstance(row.get("prompt"), str) and found.prompt == row["prompt"]
                assert bool(found.turns) == (not plain)
                record = type(record)(**{**vars(record), "turns": found.turns})
            assert found == record
            assert found.where.endswith("data.jsonl:1") and ledger.total == ledger.undecided == 1


USELESS = [
    ("text", {"text": " \n"}, "empty text"),
    ("demonstrations", {"prompt": "p", "completion": ""}, "empty completion"),
    ("demonstrations", {"prompt": "p", "response": " "}, "empty response"),
    ("dialogues", {"messages": [USER]}, "no assistant turn"),
    ("dialogues", {"messages": [USER, says(" ")]}, "an empty assistant turn"),
    ("comparisons", {"prompt": "p", "chosen": "c", "rejected": "c"}, "chosen equals rejected"),
    ("comparisons", {"chosen": "c", "rejected": "c"}, "chosen equals rejected"),
    ("comparisons", {"chosen": HH + " c", "rejected": HH + " c"}, "chosen equals rejected"),
    ("comparisons", {"chosen": [USER, says("c")], "rejected": [USER, says("c")]}, "chosen equals rejected"),
    ("comparisons", {"chosen": HH + " c", "rejected": HH}, "empty rejected response"),
    (
        "comparisons",
        {"chosen": "\n\nHuman: x" + HH, "rejected": HH},
        "chosen and rejected do not diverge at an assistant turn",
    ),
    ("rankings", {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1]}, "all ranks are tied"),
    ("rankings", {"prompt": "p", "responses": ["a", "a"], "ranks": [1, 2]}, "all responses are equal"),
    ("rankings", {"prompt": "p", "responses": ["a", " "], "ranks": [1, 2]}, "an empty response"),
    ("rankings", {"prompt": "p", "responses": ["a"], "ranks": [1]}, "expected 2 to 9 responses, got 1"),
    ("rankings", {"prompt": "p", "responses": ["a"] * 10, "ranks": [1] * 10}, "expected 2 to 9 responses, got 10"),
    ("prompts", {"prompt": ""}, "empty prompt"),
    ("prompts", {"messages": [says("x")]}, "empty prompt"),
]


def test_rows_that_teach_nothing_are_in_the_ledger(read: Any) -> None:
    for one in USELESS:
        with case(one) as (kind, row, reason):
            records, ledger = read(kind, [row])
            assert records == [] and (ledger.rejected, ledger.total, ledger.undecided) == (1, 1, 0)
            assert ledger.decisions[0].where.endswith("data.jsonl:1") and ledger.decisions[0].reason == reason


MALFORMED = [
        ("text", {"body": "x"}, "field 'text': missing; the row's fields are 'body'"),
        ("text", {"text": 3}, "field 'text': expected text, got the number 3"),
        ("text", [1, 2], 'expected an object such as {"prompt": …}, got a list of 2'),
        ("demonstrations", {"prompt": "p"}, "field 'completion': missing; the row's fields are 'prompt'"),
        ("demonstrations", {"completion": "c"}, "field 'prompt': missing"),
        ("demonstrations", {"prompt": "p", "completion": None}, "field 'completion': expected text, got null"),
        ("demonstrations", {"prompt": 1.5, "completion": "c"},
         "field 'prompt': expected text or a list of messages, got the number 1.5"),
        ("demonstrations", {"prompt": "p", "completion": "c", "response": "c"},
         "'completion': expected either it or 'response', got both"),
        ("demonstrations", {"prompt": [USER], "completion": [USER]},
         "'completion': expected one message of the assistant, got the prompt alone"),
        ("dialogues", {"messages": "hi"},
         'field \'messages\': expected a list of at least one message, got the text "hi"'),
        ("dialogues", {"messages": []}, "field 'messages': expected a list of at least one message, got a list of 0"),
        ("dialogues", {"messages": [{"role": "bot", "content": ""}]},
         "'messages[0].role': expected one of system, user, assistant, got the text \"bot\""),
        ("dialogues", {"messages": [USER, {"role": "user"}]}, "'messages[1].content': missing"),
        ("dialogues", {"messages": [USER, {"role": "system", "content": ""}]},
         "'messages[1].role': expected a system message only in first place"),
        ("dialogues", {"messages": [["user", "x"]]}, "'messages[0]': expected a message"),
        ("comparisons", {"prompt": "p", "chosen": "c"}, "field 'rejected': missing"),
        ("comparisons", {"prompt": "p", "chosen": "c", "rejected": True},
         "got the truth value true"),
        ("comparisons", {"chosen": [USER, says("x")], "rejected": "x"}, "'chosen': expected text, got a list of 2"),
        ("rankings", {"prompt": "p"}, "field 'chosen' and 'rejected', or 'responses' and 'ranks': missing"),
        ("rankings", {"prompt": "p", "responses": "ab", "ranks": [1, 2]},
         "'responses': expected a list, got the text \"ab\""),
        ("rankings", {"prompt": "p", "responses": ["a", "b"], "ranks": [1]},
         "'ranks': expected a list of 2, one for each response, got a list of 1"),
        ("rankings", {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 0]},
         "'ranks[1]': expected a whole number from 1, the best, got the number 0"),
        ("rankings", {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1.5]}, "got the number 1.5"),
        ("rankings", {"prompt": "p", "responses": ["a", "b"], "ranks": [1, True]},
         "got the truth value true"),
        ("rankings", {"prompt": "p", "responses": ["a", None], "ranks": [1, 2]},
         "'responses[1]': expected text, got null"),
        ("demonstrations", {"prompt": "p", "completion": "c", "ended": "no"},
         "'ended': expected true, or false for a response that was cut, got the text \"no\""),
        ("dialogues", {"messages": [USER, says("x")], "ended": False}, "'ended': expected true in a dialogue; use"),
        ("text", {"messages": [USER, says("x")], "ended": False}, "'ended': expected true in a dialogue; use"),
        ("text", {"text": "x", "ended": False}, "'ended': expected true beside a text, as each is taught with its end"),
        ("text", {"text": "x", "ended": 0}, "'ended': expected true, or false for a response that was cut, got the nu"),
        ("comparisons", {"prompt": "p", "chosen": "c", "rejected": "r", "ended_chosen": 0}, "got the number 0"),
        ("rankings", {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "ended": [True]},
         "'ended': expected a list of 2, one for each response, got a list of 1"),
        ("rankings", {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "ended": False}, "got the truth value"),
        ("rankings", {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "ended": [True, None]},
         "'ended[1]': expected true, or false for a response that was cut, got null"),
        ("prompts", {"text": "x"}, "field 'prompt': missing"),
    ]  # fmt: skip


def test_malformed_rows_name_file_line_and_field(read: Any) -> None:
    for one in MALFORMED:
        with case(one) as (kind, row, message):
            good: dict[str, Any] = (
                {"text": "x"} if kind == "text" else {"prompt": "p", "completion": "c", "chosen": "c", "rejected": "r"}
            )
            good = {"messages": [USER, says("x")]} if kind == "dialogues" else good
            with pytest.raises(UserError) as error:
                read(kind, [good, row])
            assert "data.jsonl:2: " in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


HOSTILE = [
    (b'{"text": "a\xff"}', "bad UTF-8: expected a file in UTF-8, got byte 0xff at byte 12 of the line"),
    (b'{"text": "\xed\xa0\x80"}', "bad UTF-8: expected a file in UTF-8, got byte 0xed at byte 11"),
    (b'{"text": "a"', "not JSON: Expecting ',' delimiter at character 13"),
    (b"{'text': 'a'}", "not JSON: "),
    (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data"),
    (b'{"text": "a\x01"}', "not JSON: Invalid control character"),
    (b'{"text": "a", "n": NaN}', "expected a JSON number, got NaN"),
    (b'{"text": "a", "n": -Infinity}', "expected a JSON number, got -Infinity"),
    (b'{"text": "a", "n": 1e999}', "the number 1e999 is too large"),
    (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "not usable JSON: Exceeds the limit"),
    (b'{"text": "a", "text": "b"}', 'the key "text" is given twice'),
    (b'{"text": "a", "n": {"k": 1, "k": 1}}', 'the key "k" is given twice'),
    (b'{"text": "a\\ud800"}', 'field "text": expected complete characters, got the lone surrogate U+D800'),
    (b'{"text": "a", "n": ["\\uDFFF"]}', 'field "n": expected complete characters, got the lone surrogate U+DFFF'),
    (b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    # 101 with the object around them; a Python may read thousands, which is more than it can walk through.
    (b'{"text": "x", "more": ' + b"[" * 100 + b"]" * 100 + b"}", "nested too deeply; expected at most 100 levels"),
    (b'{"text": [' + b"[]," * 600_000 + b"[]]}", "more than 500,000 brackets in a line"),
    (b'"text"', 'got the text "text"'),
    (b"null", "got null"),
]


OTHER_FORMATS = [
    (json.dumps([{"text": "a"}]).encode(), "one JSON array; write its objects one to a line: jq -c '.[]'"),
    (b'\xef\xbb\xbf\n[\n {"text": "a"}\n]', "one JSON array"),
    (b'[{"text": "' + b"x" * MAX_LINE_BYTES + b'"}]', "one JSON array"),
    (b'{\n "text": "a"\n}', "an object over several lines; write each on one line: jq -c ."),
    ('{"text": "a"}\n'.encode("utf-16"), "text in UTF-16; convert it: iconv -f UTF-16 "),
    ('{"text": "a"}\n'.encode("utf-16-le"), "text in UTF-16; convert it: iconv -f UTF-16LE"),
    ('{"text": "a"}\n'.encode("utf-16-be"), "text in UTF-16; convert it: iconv -f UTF-16BE"),
    ('{"text": "a"}\n'.encode("utf-32"), "text in UTF-32"),
    (gzip.compress(b'{"text": "a"}'), "a gzip file; give it a name that ends in .gz"),
    (b"PAR1\x15\x04", "a Parquet file; write it as JSON Lines, with pandas: read_parquet(FILE)"),
    (b"ARROW1\0\0", "an Arrow file"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet; unpack it: unzip FILE, or save the sheet as CSV"),
    (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1f3c\nsize 12\n",
        "a Git LFS pointer, not the file itself",
    ),
    (b"<!DOCTYPE html>\n<html>", "an HTML page; download the file itself"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"ORC\x08\x03", "an ORC file; write it as JSON Lines, with pandas: read_orc(FILE)"),
    (b"(\xb5/\xfd\x04", "a zstd file; unpack it"),
]


def test_a_file_in_another_format_says_what_to_do(read: Any, tmp_path: Path) -> None:
    for row in OTHER_FORMATS:
        with case(row) as (content, message):
            with pytest.raises(UserError) as error:
                read("text", content)
            expected = f"data.jsonl: expected one JSON object on each line, got {message}"
            assert expected in str(error.value) and "\n" not in str(error.value)
    # A pointer or an archive is no document and no table either.
    for name in ("a.txt", "a.csv"):
        for content, message in OTHER_FORMATS:
            if content.startswith((b"version", b"PAR1", b"PK", b"\x1f\x8b")):
                (tmp_path / name).write_bytes(content)
                with case((name, message)), pytest.raises(UserError) as error:
                    read_records(tmp_path / name, "text", Ledger())
                assert f"{name}: expected one JSON object on each line, got {message}" in str(error.value)


def test_tables_are_read_by_their_header(tmp_path: Path) -> None:
    messages = '[{""role"": ""user"", ""content"": ""Hi""}, {""role"": ""assistant"", ""content"": ""Ho""}]'
    alpaca = [((Message("user", "Add.\n1+1"),), "2"), ((Message("user", "Greet."),), "Hi")]
    rows: list[tuple[str, str, Any, list[Any]]] = [
        ("a.csv", "prompt,completion\np, c\n", "demonstrations", [Demonstration("p", " c")]),
        ("a.tsv", "prompt\tcompletion\np\t c\n", "demonstrations", [Demonstration("p", " c")]),
        # As spreadsheets write: a mark, CRLF, quotes, line breaks and separators in cells, blank rows, an index.
        (
            "a.csv",
            '\ufeff, prompt ,chosen,rejected,id\r\n0,"a, ""b""\r\nc",é\u2028,漢,7\r\n\r\n,,,,\r\n',
            "comparisons",
            [Comparison('a, "b"\r\nc', "é\u2028", "漢")],
        ),
        # An empty cell is absent: the system message, and Alpaca's input.
        (
            "a.csv",
            "instruction,input,output,system\nAdd.,1+1,2,\nGreet.,,Hi,\n",
            "demonstrations",
            [Demonstration(render_prompt(turns), f" {text}", turns=turns) for turns, text in alpaca],
        ),
        ("a.csv", "text\n1\ntrue\n", "text", [Text("1"), Text("true")]),
        ("a.csv", "prompt\n[1]\n", "prompts", [Prompt("[1]")]),
        (
            "a.csv",
            f'messages\n"{messages}"\n',
            "dialogues",
            [Dialogue((Message("user", "Hi"), Message("assistant", "Ho")))],
        ),
        (
            "a.csv",
            'prompt,responses,ranks,ended\np,"["" a"", "" b""]","[2, 1]","[true, false]"\n',
            "rankings",
            [Ranking("p", (" a", " b"), (2, 1), ended=(True, False))],
        ),
        ("a.csv", "prompt,completion,ended\np,c,False\n", "demonstrations", [Demonstration("p", "c", ended=False)]),
        ("a.csv", "prompt,completion,label\np,c,5 stars\n", "demonstrations", [Demonstration("p", "c")]),
        ("a.csv", '{"text": "a"}\n', "text", [Text("a")]),
        ("a.csv.gz", "text\na\n", "text", [Text("a")]),
    ]
    for row in rows:
        with case(row) as (name, content, kind, expected):
            data = content.encode()
            (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
            assert read_records(tmp_path / name, kind, Ledger()) == expected
    (tmp_path / "a.csv").write_text('task,better\n"a\nb",x\n"c",\n')
    columns = ("prompt=task", "completion=better")
    with pytest.raises(UserError, match=r"a\.csv:4: field '(completion|better)'"):
        read_records(tmp_path / "a.csv", "demonstrations", Ledger(), columns=columns)


def test_a_table_that_is_not_certain_says_where(tmp_path: Path) -> None:
    for row in (
        ("prompt,completion\np,c\np,a, b\n", ":3: expected 2 cells, as many as the header has columns, got 3"),
        ("prompt,completion\np\n", ":2: expected 2 cells"),
        ("prompt;completion\np;c\n", ":1: expected a header with columns separated by commas (.csv), got one column"),
        ("prompt,prompt\np,c\n", ":1: expected each column once, got 'prompt' twice"),
        ('prompt,completion\np,"c" d\n', ":2: not a table: "),
        ('prompt,completion\np,c\np,"c\n\n', ":3: not a table: "),
        ("prompt,completion,label\np,c,True\n", ":2: field 'label': expected no unpaired preferences"),
        ("prompt,completion,weight\np,c,0.5\n", ":2: field 'weight': expected 1"),
        (
            "prompt,messages\np,\"[{'role': 'user'}]\"\n",
            ":2: field 'messages': expected JSON in the cell, got the text",
        ),
        ("prompt,completion\n", ": expected one JSON object on each line, got a file without rows"),
        ("a,b\nc,d\n", ":2: field 'completion': missing; the row's fields are 'a', 'b'"),
    ):
        with case(row) as (content, message):
            (tmp_path / "a.csv").write_text(content)
            with pytest.raises(UserError) as error:
                read_records(tmp_path / "a.csv", "demonstrations", Ledger())
            assert f"a.csv{message}" in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "a.csv").write_bytes("prompt\né\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.csv:2: bad UTF-8"):
        read_records(tmp_path / "a.csv", "prompts", Ledger())


def test_a_text_file_is_a_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff\n\nOne, two.\r\n\r\nThree.\n".encode())
    assert read_records(path, "text", ledger := Ledger()) == [Text("One, two.\n\nThree.")]
    assert ledger.total == 1
    with pytest.raises(UserError, match=r"a\.txt:3: field 'prompt': missing; the row's fields are 'text'"):
        read_records(path, "prompts", Ledger())
    # A long one goes on in another row after a blank line, or after a line where there is none.
    paragraphs = [f"{number} " + "x" * 9_000 + "\n" for number in range(5)]
    path.write_text("\n".join(paragraphs))
    pieces = read_records(path, "text", Ledger())
    assert [piece.text[0] for piece in pieces] == ["0", "3"] and pieces[1].where.endswith(":7")
    assert "\n\n".join(piece.text for piece in pieces) == path.read_text().rstrip("\n")
    path.write_text("".join(paragraphs) * 2)
    pieces = read_records(path, "text", Ledger())
    assert [len(piece.text.splitlines()) for piece in pieces] == [5, 5]
    assert "\n".join(piece.text for piece in pieces) == path.read_text().rstrip("\n")


def test_hostile_lines(read: Any) -> None:
    for row in HOSTILE:
        with case(row) as (line, message):
            with pytest.raises(UserError) as error:
                read("text", b'\n{"text": "x"}\r\n\n' + line + b'\n{"text": "y"}')
            assert "data.jsonl:4: " in str(error.value) and message in str(error.value) and "\n" not in str(error.value)
            assert len(str(error.value)) < 400 and str(error.value).isprintable()


def test_only_a_line_feed_ends_a_line(read: Any) -> None:
    content = '\ufeff{"text": "a\u2028b\u0085c\u2029"}\r\n{"text": "\\ud83d\\ude00"}\n \n{"text": "last"}'.encode()
    records, ledger = read("text", content)
    assert [record.text for record in records] == ["a\u2028b\u0085c\u2029", "😀", "last"]
    assert records[2].where.endswith(":4") and ledger.total == 3


def test_a_huge_line_takes_little_memory(tmp_path: Path) -> None:
    for suffix in [".jsonl", ".jsonl.gz"]:
        with case(suffix):
            path = tmp_path / f"huge{suffix}"
            if suffix == ".jsonl":
                with path.open("wb") as file:
                    file.write(b'{"text": "x"}\n')
                    file.truncate(2**30)  # a sparse file: a line of a gigabyte of zeros
            else:
                path.write_bytes(gzip.compress(b'{"text": "x"}\n' + bytes(64 * 2**20), compresslevel=1))
            tracemalloc.start()
            with pytest.raises(UserError, match=rf"huge{suffix}:2: a line of more than {MAX_LINE_BYTES:,} bytes"):
                read_records([path], "text", Ledger())
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 4 * MAX_LINE_BYTES


def test_gzip_and_its_damage(tmp_path: Path) -> None:
    rows = b"".join(b'{"text": "%d"}\n' % n for n in range(1000))
    good, cut, fake = (tmp_path / f"{name}.jsonl.gz" for name in ("good", "cut", "fake"))
    good.write_bytes(gzip.compress(rows))
    cut.write_bytes(gzip.compress(rows)[:-100])
    fake.write_bytes(rows)
    assert len(read_records([good, str(good)], "text", Ledger())) == 2000
    for path, message in (
        (cut, r"cut\.jsonl\.gz:\d+: cannot be read"),
        (fake, r"fake\.jsonl\.gz: cannot be read: Not a g"),
    ):
        with pytest.raises(UserError, match=message):
            read_records([path], "text", Ledger())


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read: No such file"):
        read_records([tmp_path / "none.jsonl"], "text", Ledger())
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_records(tmp_path, "text", Ledger())
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    with pytest.raises(
        UserError, match=r"empty\.jsonl: expected one JSON object on each line, got a file without rows"
    ):
        read_records([tmp_path / "empty.jsonl"], "text", Ledger())


def test_a_row_that_stands_twice_is_kept_with_a_remark(read: Any) -> None:
    records, ledger = read("text", [{"text": "a"}, {"text": "b"}, {"text": "a"}])
    assert len(records) == 3
    assert [(d.what, d.where[-2:]) for d in ledger.decisions] == [("remarked", ":3")]


def test_rows_that_contradict_each_other_or_ask_nothing_have_a_remark(read: Any) -> None:
    def pair(chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
        return {"prompt": "p", "chosen": chosen, "rejected": rejected, **more}

    def ranking(*responses: str, ranks: list[int]) -> dict[str, Any]:
        return {"prompt": "p", "responses": list(responses), "ranks": ranks}

    opposite = "the opposite of "
    for kind, rows, remarks in (
        ("comparisons", [pair("a", "b"), pair("b", "a"), pair("a", "c")], {2: opposite}),
        ("comparisons", [pair("a", "b"), pair("b", "a", prompt="q")], {}),
        # Cut off, it is another response.
        ("comparisons", [pair("a", "b", ended_chosen=False), pair("b", "a")], {}),
        ("rankings", [ranking("a", "b", "c", ranks=[1, 2, 3]), pair("c", "a")], {2: opposite}),
        ("rankings", [ranking("a", "b", ranks=[1, 2]), ranking("b", "c", "a", ranks=[1, 1, 2])], {2: opposite}),
        ("rankings", [ranking("a", "b", ranks=[1, 2]), ranking("a", "b", "c", ranks=[2, 2, 1])], {}),
        (
            "demonstrations",
            [{"prompt": "", "completion": "c"}, {"prompt": "p", "completion": "c"}],
            {1: "an empty prompt"},
        ),
        ("demonstrations", [{"prompt": " \n", "completion": "c"}], {1: "an empty prompt"}),
    ):
        with case((kind, rows)):
            records, ledger = read(kind, rows)
            assert len(records) == len(rows) and [d.what for d in ledger.decisions] == ["remarked"] * len(remarks)
            for decision, (line, reason) in zip(ledger.decisions, remarks.items(), strict=True):
                assert decision.where.endswith(f":{line}") and decision.reason.startswith(reason)
    _, ledger = read("comparisons", [pair("a", "b"), pair("b", "a")])
    assert ledger.decisions[0].reason.partition(": ")[0].endswith("data.jsonl:1")


def test_a_line_of_a_great_many_keys_or_numbers_takes_little_memory(read: Any) -> None:
    keys = b"{" + b",".join(b'"%x":1' % n for n in range(700_000)) + b"}"
    spaced = b"{" + b",".join(b'"%x" : 1' % n for n in range(150_000)) + b"}"
    numbers = b'{"text": [' + b"1.5," * 1_900_000 + b"1]}"
    for line, words in ((keys, "100,000 keys"), (spaced, "100,000 keys"), (numbers, "1,000,000 commas")):
        with case(words):
            tracemalloc.start()
            with pytest.raises(UserError, match=f"data.jsonl:1: more than {words} in a line"):
                read("text", line)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 4 * MAX_LINE_BYTES
    prose = json.dumps({"text": 'He said, "no": so be it, then. ' * 90_000}).encode()
    assert len(read("text", prose)[0]) == 1


def test_a_thousand_transcripts_come_back(read: Any) -> None:
    """No character of a transcript is lost between prompt and response, wherever the two part."""
    rows = []
    for n in range(1000):
        shared = (
            "".join(f"\n\nHuman: q{k}\nline {n}\n\nAssistant: a{k}" for k in range(n % 4))
            + "\n\nHuman: last\n\nAssistant:"
        )
        rows.append(
            {
                "chosen": f"{shared} good\n\n{n}",
                "rejected": f"{shared} bad {n}" + "\n\nHuman: x\n\nAssistant: y" * (n % 3),
            }
        )
    records, _ = read("comparisons", rows)
    assert [r.prompt + r.chosen for r in records] == [row["chosen"] for row in rows]
    assert [r.prompt + r.rejected for r in records] == [row["rejected"] for row in rows]
