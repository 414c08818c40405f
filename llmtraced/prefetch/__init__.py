"""The sidecar: pin, prefetch and evict a running server's model pages, from outside.

What is imported here, and in policy, memory, pages, readers, clock, governor and sidecar, is the standard library
only: these run in a bare interpreter inside the server's memory cgroup, where every byte is one less for the model.
"""
