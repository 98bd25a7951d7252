"""The deployments of the integration tests."""

from tests.integration.conftest import deploy_for_module

__all__ = ["deploy_for_module"]
