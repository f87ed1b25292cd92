"""What of Python is not on Windows: names of modules, and of what is in modules."""

from __future__ import annotations

# What Python's own documentation of these modules marks as available on Unix only. O_BINARY is the other way round.
MODULES = ("crypt", "curses", "fcntl", "grp", "nis", "posix", "pty", "pwd", "readline", "resource", "spwd", "syslog",
           "termios", "tty")  # fmt: skip
ATTRIBUTES = {
    "os": """O_ASYNC O_CLOEXEC O_DIRECT O_DIRECTORY O_DSYNC O_NDELAY O_NOATIME O_NOCTTY O_NOFOLLOW O_NONBLOCK O_PATH
        O_SYNC O_TMPFILE WEXITED WNOHANG WNOWAIT chown chroot confstr copy_file_range ctermid eventfd fchdir fchmod
        fchown fdatasync fork forkpty fpathconf fstatvfs getegid geteuid getgid getgroups getloadavg getpgid getpgrp
        getpriority getresuid getsid getuid getxattr initgroups killpg lchown lockf major memfd_create minor mkfifo
        mknod nice openpty pathconf pipe2 posix_fadvise posix_fallocate posix_spawn pread preadv pwrite pwritev readv
        register_at_fork removexattr sched_getaffinity sched_setaffinity sched_yield sendfile seteuid setgid setgroups
        setpgid setpriority setsid setuid setxattr splice statvfs sync sysconf tcgetpgrp ttyname uname unshare wait
        wait3 wait4 waitid writev""",
    "signal": """ITIMER_REAL SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGTTIN
        SIGTTOU SIGUSR1 SIGUSR2 SIGXCPU SIGXFSZ alarm getitimer pause pthread_kill pthread_sigmask setitimer
        siginterrupt sigpending sigtimedwait sigwait""",
    "socket": "AF_UNIX sethostname",
    "time": "clock_settime pthread_getcpuclockid tzset",
}
OTHERWISE = {("os", "kill"), ("os", "symlink")}
"""Windows has these, but ``os.kill`` ends a process whatever the signal, and links are for administrators."""
