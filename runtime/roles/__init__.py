"""The processes of a deployment, one module each: what a role wires together, and nothing of what it does."""
