import dataclasses
import functools
import random
from dataclasses import dataclass, field

import pytest
import torch

from ferryman_service.domain.corpora import CorpusFiles, Side, Split
from ferryman_service.domain.recipe import resolve_recipe
from ferryman_service.domain.training import TrainingJob

WORDS = ["alo", "beki", "cumi", "dena", "efu", "gira", "hoso", "ila", "jupe", "kenu", "lam", "mori"]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class RecordingReporter:
    """A Reporter that keeps what it is told, and raises what it is armed with at a check of choice."""

    steps: list = field(default_factory=list)
    validations: list = field(default_factory=list)
    events: list = field(default_factory=list)
    decays: list = field(default_factory=list)
    checks_left: int = -1
    error: Exception = None

    def step(self, metrics):
        self.steps.append(metrics)

    def validation(self, metrics):
        self.validations.append(metrics)

    def decay_plan(self, plan):
        self.decays.append(plan)

    def event(self, level, code, message, *, repeats=False):
        self.events.append((code, message))

    def resume(self, reports):
        self.resumed_at = reports

    def flush(self):
        pass

    def check(self):
        self.checks_left -= 1
        if self.checks_left == 0:
            raise self.error

    def messages(self, code):
        return [message for event_code, message in self.events if event_code == code]


@pytest.fixture
def reporter():
    return RecordingReporter()


def write_corpus_to(folder, train, validation):
    """Write the pairs of both splits and return the corpus."""
    files = {}
    for split, pairs in ((Split.TRAIN, train), (Split.VALIDATION, validation)):
        for position, side in enumerate(Side):
            path = folder / f"{split}.{side}"
            path.write_bytes("".join(f"{pair[position]}\n" for pair in pairs).encode())
            files[split, side] = path
    return CorpusFiles(files=files)


@pytest.fixture
def write_corpus(tmp_path):
    return functools.partial(write_corpus_to, tmp_path)


def reversed_pairs(count, seed):
    """Sentences of made-up words, to be translated into the same words from the last to the first."""
    generator = random.Random(seed)
    sentences = [generator.choices(WORDS, k=generator.randint(2, 5)) for _ in range(count)]
    return [(" ".join(words), " ".join(reversed(words))) for words in sentences]


def write_reverse_corpus(folder):
    return write_corpus_to(folder, reversed_pairs(1500, seed=1), reversed_pairs(40, seed=2))


@pytest.fixture
def reverse_corpus(tmp_path):
    return write_reverse_corpus(tmp_path)


def make_small_recipe(**changes):
    overrides = {
        "model": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "heads": 2, "ffn_dim": 64, "dropout": 0.0},
        "data": {"vocabulary_size": 36, "max_sentence_tokens": 40},
        "schedule": {"warmup_steps": 60, "factor": 1.5},
        "optimization": {"batch_target_tokens": 512},
        "stop": {"max_steps": 20},
        "validation": {"interval_steps": 10, "max_translated_pairs": 40, "keep_last": 2},
    }
    for part, values in changes.items():
        overrides[part] = overrides[part] | values if isinstance(values, dict) else values
    return resolve_recipe(overrides)


@pytest.fixture
def small_recipe():
    """Makes a recipe for a network that learns to reverse in seconds; keywords are parts of the recipe."""
    return make_small_recipe


@pytest.fixture(scope="session")
def shared_prepared_dir(tmp_path_factory):
    """Holds the prepared corpora of reversed sentences: each is made once."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def job(tmp_path, reverse_corpus, shared_prepared_dir):
    """Makes a job of a recipe, over the corpus of reversed sentences."""

    def make(recipe, corpus=None):
        run_dir = tmp_path / "run"
        run_dir.mkdir(exist_ok=True)
        job = TrainingJob(
            run_id="run_1",
            recipe=recipe,
            corpus=corpus or reverse_corpus,
            run_dir=run_dir,
            prepared_dir=tmp_path / "prepared",
        )
        if corpus is None:
            job = dataclasses.replace(job, prepared_dir=shared_prepared_dir, corpus_digest="reversed")
        return job

    return make
