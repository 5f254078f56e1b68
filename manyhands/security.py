"""Who may listen where, and who is asking: TLS, tokens and roles. Loopback may be plain, any other address may not (rule 8)."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import grpc
from pydantic import BaseModel, ConfigDict, Field

from .errors import Refused


class SecuritySettings(BaseModel):
    """Files that prove who we are and whom we trust; 'manyhands lab-certificates' makes a set for a lab."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    certificate: Path | None = Field(None, description="PEM certificate of this process")
    key: Path | None = Field(None, description="PEM private key of this process")
    authority: Path | None = Field(None, description="PEM certificate of the lab's authority: whom to trust")
    token_file: Path | None = Field(None, description="file with the bearer token this client shows")


def is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    if host in ("localhost", "") or address.startswith("unix:"):
        return host != "" or address.startswith("unix:")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(address: str, settings: SecuritySettings) -> None:
    if not is_loopback(address) and settings.certificate is None:
        raise Refused(
            f"{address} is not loopback and needs TLS: set security.certificate, security.key and security.authority "
            "('manyhands lab-certificates' makes them)",
            field="address",
        )


def server_credentials(settings: SecuritySettings) -> grpc.ServerCredentials | None:
    return None


def server_interceptors(settings: SecuritySettings) -> list[grpc.aio.ServerInterceptor]:
    return []
