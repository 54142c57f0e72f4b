"""Other projects' tools on jaxserve's engine; each needs the extra of its name."""
