"""What every manyhands process shares: contracts, codec, specs, errors, clients, security, configuration.

Imports numpy, grpc and protobuf; never torch, so that a robot PC stays light.
"""

__version__ = "0.1.0"
