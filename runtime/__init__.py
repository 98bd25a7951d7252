"""What people RUN: command line, settings (the only reader of the environment), embedded stack, process manager.

It is not: home to any rule about events, money or patients.
"""
