"""The HTTP door: OpenAI's API over the same engines as gRPC's."""
