"""python -m tests.support.robot_program ADDRESS MODEL ROBOT: a robot to be killed, which asks until then.

Says GOING when a chunk and a piece of text have come. Knows the spec by asking the server, so that it starts without torch.
"""

from __future__ import annotations

import itertools
import sys
import threading
import uuid

import numpy as np

from manyhands.clients.act_stream import Chunk
from manyhands.clients.inference import InferenceClient
from manyhands.inference.v1 import inference_pb2
from manyhands.spec import FeatureKind, Spec

NUM_TEXTS = 4


def main(address: str, model: str, robot: str) -> None:
    with InferenceClient(address) as client:
        (served,) = [found for found in client.list_models() if found.name == model]
        spec = Spec.from_proto(served.spec)
        session = client.open_session(
            robot_id=robot, client_id=uuid.uuid4().hex, model=model, spec=spec, replan_interval_steps=4
        )
        observation = {
            feature.name: np.zeros(feature.shape, dtype=np.uint8 if feature.kind is FeatureKind.IMAGE else np.float32)
            for feature in spec.observation
        }
        texts_begun = threading.Semaphore(0)

        def ask_text() -> None:
            while True:
                for number, _ in enumerate(
                    client.generate(
                        session.session_id,
                        kind=inference_pb2.TEXT_KIND_SUBTASK,
                        observation=observation,
                        task="never finished",
                        max_new_tokens=1024,
                        deadline_s=60.0,
                    )
                ):
                    if not number:
                        texts_begun.release()

        with client.act_stream(session.session_id) as stream:
            if session.has_text_head:
                for _ in range(NUM_TEXTS):
                    threading.Thread(target=ask_text, daemon=True).start()
                texts_begun.acquire()
            for seed in itertools.count(1):
                stream.send(observation=observation, task="reach", noise_seed=seed, deadline_s=5.0)
                reply = stream.receive(20.0)
                if reply is not None and isinstance(reply.result, Chunk):
                    print("GOING", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
