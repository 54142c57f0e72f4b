"""One engine on the GPUs of several machines: who they are, the steps they all run, their processes, the front end."""
