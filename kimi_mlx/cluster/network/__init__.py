"""Networks between hosts: find them, measure them, choose one."""
