"""Errors of the embedded stack that a person reads, each with its remedy."""

from __future__ import annotations

from schemas.failure import ConfigurationError, FatalError, TemporaryError


class UnsupportedPlatformError(ConfigurationError):
    """This machine is neither Linux x86-64 nor macOS."""

    code = "RS120"
    meaning = "The embedded stack does not run on this kind of machine."
    default_remedy = "Use Linux x86-64 or macOS, or point the settings at your own Kafka, registry and Redis."


class MissingLibraryError(ConfigurationError):
    """The operating system lacks a library that redis-server needs."""

    code = "RS121"
    meaning = "A shared library that the embedded redis-server needs is not installed."
    default_remedy = (
        "Install OpenSSL 3 (Debian, Ubuntu: package libssl3; Fedora: openssl-libs; macOS: brew install openssl@3)."
    )


class PortTakenError(TemporaryError):
    """A port that may not change is used by another program."""

    code = "RS220"
    meaning = "A port the embedded stack must use is taken by another program."
    default_remedy = "Stop the program on that port, or choose another port, then run the same command again."


class DownloadError(TemporaryError):
    """A locked file could not be fetched."""

    code = "RS221"
    meaning = "A file of the embedded stack could not be downloaded; what was fetched is kept and resumed."
    default_remedy = (
        "Check the network. Behind a proxy set HTTPS_PROXY and, for its certificate, SSL_CERT_FILE or "
        "REQUESTS_CA_BUNDLE; without access name a Maven mirror. Then run the same command again."
    )


class DiskSpaceError(TemporaryError):
    """Too little room for the download or the data."""

    code = "RS222"
    meaning = "There is not enough free disk space for the embedded stack."
    default_remedy = (
        "Free the named amount of space, or choose a folder on another disk, then run the same command again."
    )


class ComponentStartError(TemporaryError):
    """A component ended, or was not ready in time."""

    code = "RS223"
    meaning = "A component of the embedded stack did not start."
    default_remedy = "Read the named log file; `make reset` removes the stack's data if it is damaged."


class StackBusyError(TemporaryError):
    """Another command is changing the same stack."""

    code = "RS224"
    meaning = "Another process is starting, stopping or downloading the embedded stack."
    default_remedy = "Wait until the other command has ended, then run the same command again."


class ChecksumError(FatalError):
    """The bytes served are not the locked ones."""

    code = "RS321"
    meaning = "A downloaded file does not have the committed sha256; it was deleted and not used."
    default_remedy = (
        "Ask whoever runs the proxy or mirror why it changes files. If the lock is wrong, write it anew with "
        "`python -m runtime.stack.lock`."
    )
