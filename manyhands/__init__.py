"""What every manyhands process shares: contracts, codec, specs, errors, clients, security, configuration.

Imports numpy, grpc and protobuf; never torch, so that a robot PC stays light.
"""

import os

# gRPC's core writes past our logs, a line for each connection that comes or goes, and reads this when it is imported.
# GRPC_VERBOSITY=INFO in the environment brings them back: they say why a TLS handshake failed.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

__version__ = "0.1.0"
