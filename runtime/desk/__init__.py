"""The desk: what people look at and decide when the machinery may not. Every act is in the topic `audit`."""
