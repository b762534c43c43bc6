"""Calls that read wait for none that writes."""

from ferryman.v1 import corpus_pb2, model_pb2, training_pb2
from ferryman_service.stores.database import writing

WRITERS = 33  # of each kind: more than there are threads of any kind


def test_readers_are_answered_while_any_number_of_writers_wait(service):
    alias = model_pb2.SetModelAliasRequest(name="en-de", alias="production", version=1)
    run_id = service.start_run().run_id
    with writing(service.database):
        waiting = [
            call.future(request)
            for _ in range(WRITERS)
            for call, request in (
                (service.model_stub.SetModelAlias, alias),
                (service.model_stub.DeleteModelAlias, model_pb2.DeleteModelAliasRequest(name="en-de", alias="x")),
                (service.training_stub.PauseTraining, training_pb2.PauseTrainingRequest(run_id=run_id)),
                (service.corpus_stub.DeleteCorpus, corpus_pb2.DeleteCorpusRequest(corpus_id="corpus_x")),
                (service.training_stub.DeleteTrainingRun, training_pb2.DeleteTrainingRunRequest(run_id=run_id)),
            )
        ]
        assert service.model_stub.ListModels(model_pb2.ListModelsRequest()).models
        assert service.corpus_stub.ListCorpora(corpus_pb2.ListCorporaRequest()).corpora
        assert service.training_stub.ListTrainingRuns(training_pb2.ListTrainingRunsRequest()).runs
        assert not any(call.done() for call in waiting)
        for call in waiting:
            call.cancel()
