"""A fake Ferryman service for your own tests: a real gRPC server on a loopback port, without a real service behind it.

    from ferryman import Client
    from ferryman.testing import FakeFerryman

    with FakeFerryman(translate=str.upper) as fake, Client(fake.target) as client:
        fake.add_model("en-de")
        assert client.translate("en-de", "hallo").translations[0].text == "HALLO"

The fake keeps corpora in memory. A run replays a script of records at once, and publishes a model if it succeeds. Every
model translates with your function, can be downloaded, and is loaded by its first translation. A run that `hold_after`
holds can be paused, resumed and cancelled. The fake validates only the fields that it needs, does not resolve recipes,
and answers GetLRSchedule with the same function of the step for every schedule.
"""

from ferryman.testing._backend import model_files
from ferryman.testing._fake import FakeFerryman
from ferryman.testing._script import noam_learning_rate, training_script

__all__ = ["FakeFerryman", "model_files", "noam_learning_rate", "training_script"]
