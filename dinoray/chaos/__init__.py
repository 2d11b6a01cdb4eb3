"""`dinoray chaos`: the kill test as a command. A run is killed again and again, resumed, and compared with a clean one."""
