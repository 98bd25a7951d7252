"""The stack and deployments of the integration tests."""

from tests.integration.conftest import deploy_for_module, embedded_stack

__all__ = ["deploy_for_module", "embedded_stack"]
