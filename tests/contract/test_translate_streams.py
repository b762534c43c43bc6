"""StreamTranslate over the wire: answered, refused, held back, broken off."""

import queue
import threading
import time

import grpc
import pytest

from ferryman import AsyncClient, Client
from ferryman.v1 import translation_pb2
from tests.fakes.loopback_service import LoopbackService
from tests.fakes.translator import FakeBundleLoader

LABELS = {"grpc_service": "ferryman.v1.TranslationService", "grpc_method": "StreamTranslate"}


def config(**fields):
    return translation_pb2.StreamTranslateRequest(
        config=translation_pb2.StreamTranslateConfig(**{"model": "en-de", **fields})
    )


def sentences(*texts, **fields):
    wire = [translation_pb2.StreamSentence(id=text, sentence=text, **fields) for text in texts]
    return translation_pb2.StreamTranslateRequest(sentences=translation_pb2.StreamSentences(sentences=wire))


class Sender:
    """The requests of a call, sent when a test says so. `taken` counts those that gRPC has taken."""

    def __init__(self, *messages):
        self._messages = queue.SimpleQueue()
        self.taken = 0
        self.send(*messages)

    def send(self, *messages):
        for message in messages:
            self._messages.put(message)

    def half_close(self):
        self._messages.put(None)

    def __iter__(self):
        while (message := self._messages.get(timeout=20)) is not None:
            self.taken += 1
            yield message


def outcomes(responses):
    return [(item.id, item) for response in responses for item in response.translations]


def handled(service, code):
    return service.metric("grpc_server_handled_total", **LABELS, grpc_type="bidi_stream", grpc_code=code)


def test_translations_come_with_their_ids_until_the_last(service):
    messages = [
        config(options={"n_best": 2, "return_token_scores": True}, window=3),
        sentences("a dog", "", "too long " * 5),
        sentences("a cat", target_prefix="Die"),
    ]
    responses = list(service.translation_stub.StreamTranslate(iter(messages), timeout=20))
    assert {response.model for response in responses} == {"en-de/1"}
    assert all(response.translations for response in responses)
    found = dict(outcomes(responses))
    assert [hypothesis.text for hypothesis in found["a dog"].translation.hypotheses] == ["A DOG"] * 2
    assert list(found["a dog"].translation.hypotheses[0].pieces) == ["A", "DOG", "</s>"]
    assert list(found["a dog"].translation.source_pieces) == ["a", "dog", "</s>"]
    assert found["a cat"].translation.hypotheses[0].text == "Die A CAT"
    assert found[""].translation.hypotheses[0].text == ""
    assert found["too long " * 5].error.reason == "SENTENCE_TOO_LONG"
    assert len(outcomes(responses)) == 4


def test_finished_translations_travel_together(service):
    messages = [config(window=4096), *(sentences(*[str(i)] * 1000) for i in range(4))]
    responses = list(service.translation_stub.StreamTranslate(iter(messages), timeout=20))
    assert len(outcomes(responses)) == 4000
    assert len(responses) < 400


def test_responses_are_of_bounded_size(service):
    long = "x" * 300_000
    messages = [config(options={"n_best": 2, "beam_size": 2}), sentences(*"abcdefghij")]
    for sentence in messages[1].sentences.sentences:
        sentence.sentence = long
    responses = list(service.translation_stub.StreamTranslate(iter(messages), timeout=20))
    assert len(responses) > 1
    assert max(response.ByteSize() for response in responses) < 1_300_000
    assert len(outcomes(responses)) == 10


@pytest.mark.parametrize(
    ("messages", "violations"),
    [
        ([], [("config", "REQUIRED")]),
        ([sentences("a")], [("config", "REQUIRED")]),
        ([translation_pb2.StreamTranslateRequest()], [("config", "REQUIRED")]),
        ([config(), config()], [("config", "UNEXPECTED")]),
        ([config(), translation_pb2.StreamTranslateRequest()], [("stream_part", "REQUIRED")]),
        ([config(), sentences()], [("sentences.sentences", "OUT_OF_RANGE")]),
        ([config(), sentences(*["a"] * 1025)], [("sentences.sentences", "OUT_OF_RANGE")]),
        (
            [config(), sentences("a", "ä" * 65, "b", "x" * 129)],
            [("sentences.sentences[1].id", "TOO_LONG"), ("sentences.sentences[3].id", "TOO_LONG")],
        ),
        (
            [config(split_sentences=True), sentences("a", target_prefix="b")],
            [("sentences.sentences[0].target_prefix", "CONFLICT")],
        ),
        (
            [config(model="!", window=0, options={"beam_size": 3, "sampling": {"top_p": 0}, "early_stopping": 7})],
            [
                ("config.model", "INVALID_MODEL_REFERENCE"),
                ("config.options.early_stopping", "UNKNOWN_ENUM_VALUE"),
                ("config.options.beam_size", "CONFLICT"),
                ("config.options.sampling.top_p", "OUT_OF_RANGE"),
                ("config.window", "OUT_OF_RANGE"),
            ],
        ),
    ],
)
def test_mistakes_end_the_stream(service, refused, messages, violations):
    refusal = refused(service.translation_stub.StreamTranslate, iter(messages))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert refusal.violations == violations


def test_a_mistake_ends_also_a_stream_that_works(service, refusal_of):
    sender = Sender(config(), sentences("wait", "a dog"))
    call = service.translation_stub.StreamTranslate(iter(sender), timeout=20)
    assert next(call).translations[0].id == "a dog"
    sender.send(sentences())
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    assert refusal_of(caught.value).reason == "INVALID_REQUEST"
    sender.half_close()


def test_a_message_is_read_only_when_there_is_room(service, refusal_of):
    """A mistake behind a full window is not found before the window has room."""
    sender = Sender(config(window=2), sentences("wait"), sentences("wait"), sentences())
    call = service.translation_stub.StreamTranslate(iter(sender), timeout=0.5)
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    sender.half_close()
    sender = Sender(config(window=3), sentences("wait"), sentences("wait"), sentences())
    with pytest.raises(grpc.RpcError) as caught:
        next(service.translation_stub.StreamTranslate(iter(sender), timeout=20))
    assert refusal_of(caught.value).reason == "INVALID_REQUEST"
    sender.half_close()


def test_a_message_that_cannot_be_read(service, refused):
    call = service.channel.stream_stream("/ferryman.v1.TranslationService/StreamTranslate")
    refusal = refused(call, iter([config().SerializeToString(), b"\xff\xff\xff"]))
    assert (refusal.reason, refusal.violations) == ("INVALID_REQUEST", [("request", "MALFORMED")])


def test_a_bug_says_nothing_of_our_insides(service, refused):
    refusal = refused(service.translation_stub.StreamTranslate, iter([config(), sentences("break")]))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in refusal.message


def test_who_leaves_is_not_worked_for(make_service, eventually):
    service = make_service()
    service.import_model("en-de")
    engine = service.loader.translator
    sender = Sender(config(), sentences(*["wait"] * 100))
    call = service.translation_stub.StreamTranslate(iter(sender))
    assert engine.busy.wait(10)
    call.cancel()
    eventually(lambda: engine.in_flight == 0)
    eventually(lambda: handled(service, "CANCELLED") == 1)
    eventually(lambda: service.metric("ferryman_translate_in_flight", method="StreamTranslate") == 0)
    assert service.metric("ferryman_translate_queue_tokens", method="StreamTranslate") == 0
    sender.half_close()


def test_a_deadline_ends_a_stream(make_service, eventually):
    service = make_service()
    service.import_model("en-de")
    sender = Sender(config(), sentences("wait"))
    call = service.translation_stub.StreamTranslate(iter(sender), timeout=0.3)
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: service.loader.translator.in_flight == 0)
    eventually(lambda: handled(service, "DEADLINE_EXCEEDED") == 1)
    sender.half_close()


def test_a_stopping_server_ends_streams_at_once(make_service, refusal_of):
    service = make_service()
    service.import_model("en-de")
    senders = [Sender(), Sender(config()), Sender(config(), sentences("wait"))]
    calls = [service.translation_stub.StreamTranslate(iter(sender)) for sender in senders]
    assert service.loader.translator.busy.wait(10)
    assert service.stop(grace_s=20) < 10
    for call in calls:
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        refusal = refusal_of(caught.value)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_SHUTTING_DOWN")
        assert "RetryInfo" in refusal.details
    for sender in senders:
        sender.half_close()


def test_who_does_not_read_is_not_read_from_and_holds_up_nobody(make_service, eventually):
    service = make_service()
    service.import_model("en-de")
    engine = service.loader.translator
    message = sentences("a", "b")
    for sentence in message.sentences.sentences:
        sentence.sentence = "x" * 50_000
    endless = Sender(config(window=8), *[message] * 2000)
    call = service.translation_stub.StreamTranslate(iter(endless))
    eventually(lambda: engine.submitted > 0)

    def nothing_moves():
        before = engine.submitted, endless.taken
        time.sleep(0.5)
        return (engine.submitted, endless.taken) == before

    eventually(nothing_moves, timeout_s=60)
    submitted = engine.submitted
    assert endless.taken < 1000
    request = translation_pb2.TranslateRequest(model="en-de", sentences=["a dog"])
    assert service.translation_stub.Translate(request, timeout=5).translations[0].hypotheses[0].text == "A DOG"
    for _ in range(50):
        next(call)
    assert engine.submitted > submitted
    call.cancel()
    endless.half_close()


def test_what_a_stream_does_is_measured(make_service):
    service = make_service()
    service.import_model("en-de")
    messages = [config(), sentences("a small dog", "yes", "", "long " * 9)]
    list(service.translation_stub.StreamTranslate(iter(messages), timeout=20))
    assert service.metric("ferryman_translate_sentences_total") == 3
    assert set(service.loader.translator.peers) == {"ipv4:127.0.0.1"}
    assert service.metric("ferryman_translate_source_tokens_total") == 6
    assert service.metric("ferryman_translate_target_tokens_total") == 7
    assert service.metric("ferryman_translate_sentence_seconds_sum", stage="decode") == pytest.approx(9)
    assert service.metric("ferryman_translate_sentence_steps_sum") == 12
    assert service.metric("ferryman_translate_seconds_count", stage="decode") == 0, "that is of unary calls"


def test_lines_that_fit_no_message_together_are_all_translated(service):
    lines = ["x" * 300_000] * 64
    with Client(service.address) as client:
        results = list(client.translate_stream("en-de", lines, in_order=True, beam_size=1))
    assert [result.translation.text for result in results] == [line.upper() for line in lines]


async def test_a_line_that_fits_no_request_has_an_error_of_its_own(service):
    lines = ["one", "x" * 2**24, "\udcff", "two"]
    too_large = "sentence has 16,777,234 bytes, a request may have 4,194,304: send the text in parts"
    with Client(service.address) as client:
        found = [list(client.translate_stream("en-de", lines, in_order=in_order)) for in_order in (True, False)]
        assert [result.error.reason for result in client.translate_stream("en-de", lines[1:2])] == ["REQUEST_TOO_LARGE"]
    async with AsyncClient(service.address) as async_client:
        found.append([result async for result in async_client.translate_stream("en-de", lines)])
    for results in found:
        first, second, third, fourth = sorted(results, key=lambda result: result.id)
        assert (first.translation.text, fourth.translation.text) == ("ONE", "TWO")
        assert (second.translation, second.error.reason, second.error.message) == (None, "REQUEST_TOO_LARGE", too_large)
        assert (third.translation, third.error.reason) == (None, "NOT_UTF8")


def test_many_streams_and_calls_at_once_get_what_is_theirs(tmp_path):
    service = LoopbackService(tmp_path, loader=FakeBundleLoader(delay_s=0.03), queue_tokens=60)
    service.import_model("en-de")
    failures = []

    def stream(name):
        with Client(service.address) as client:
            items = [(f"{name} {i}", f"{name} {i}") for i in range(300)]
            found = {r.id: r.translation.text for r in client.translate_stream("en-de", items, beam_size=1, window=20)}
            if found != {id_: text.upper() for id_, text in items}:
                failures.append(name)

    def call(name):
        with Client(service.address) as client:
            for i in range(20):
                if client.translate("en-de", f"{name} {i}", beam_size=1).translations[0].text != f"{name} {i}".upper():
                    failures.append(name)

    try:
        threads = [threading.Thread(target=stream, args=[f"stream{i}"]) for i in range(6)]
        threads += [threading.Thread(target=call, args=[f"call{i}"]) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failures == []
        assert service.loader.translator.in_flight == 0
    finally:
        service.close()
