"""What a policy says of files, programs and the sandbox, on a real systemd: each denied act beside its allowed twin."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.guarded import POLICY_FILE, WORK, last_sequence, records
from tests.lab.harness import Container, Result, eventually
from tests.lab.harness.__main__ import newest_debs

HOME = "/home/dev"
HEAD = '[policy]\nid = "box"\n'
FILES = """
[[rule]]
id = "keys"
effect = "deny"
file = { paths = ["~/.ssh/**", "~/.netrc*"] }

[[rule]]
id = "notes"
effect = "deny"
file = { paths = ["/srv/notes/**"], access = ["write", "delete"] }

[[rule]]
id = "log"
effect = "deny"
file = { paths = ["~/work/log"], access = ["delete"] }
"""
PROGRAMS = """
[[rule]]
id = "no-tools"
effect = "deny"
exec = { paths = ["/usr/bin/whoami", "/opt/tools/**"] }
"""
SANDBOX = """
[sandbox]
writable  = [".", "/srv/notes"]
read_only = [".git/hooks", ".envrc", "missing"]
"""
STRICT = """
[policy]
id      = "box"
default = { exec = "deny", file = "deny" }

[[rule]]
id = "shell"
effect = "allow"
exec = { paths = ["/usr/bin/sh", "/usr/bin/dash", "/usr/bin/cat", "/usr/bin/cp", "~/work/bin/**"] }

[[rule]]
id = "settings"
effect = "allow"
file = { paths = ["~/.gitconfig", "~/.config/tool/**"], access = ["read"] }
"""
PREPARE = f"""
set -e
cd {HOME}
mkdir -p .ssh .config/tool .config/other work/.git/hooks work/bin work/sub /srv/notes /opt/tools
for f in .ssh/id .netrc .netrc.old .gitconfig .config/tool/a .config/other/a work/.git/hooks/pre \\
         work/.git/config work/.envrc work/log work/sub/file; do echo kept > $f; done
cp /usr/bin/id work/bin/id; cp /usr/bin/id /opt/tools/id
echo kept > /srv/notes/a
chown -R dev:dev {HOME} /srv/notes /opt/tools
"""


@pytest.fixture(scope="module")
def box() -> Iterator[Container]:
    with Container() as container:
        container.install_deb(*newest_debs())
        for agent, layers in (("default", '["sdk"]'), ("watched", '["kernel"]')):
            path = f"/etc/agent-assembly/agents.d/{agent}.toml"
            container.push(path, f"layers = {layers}\n")
        container.run(PREPARE).check()
        container.systemctl("start", "aa-gateway.socket", "aa-launch.socket", "aa-ebpf").check()
        yield container


def policy(box: Container, text: str) -> None:
    box.push(POLICY_FILE, text)
    box.run(["aasm", "policy", "reload"]).check()


def run(box: Container, command: str, *, agent: str = "default", cwd: str = WORK) -> Result:
    return box.run(
        ["aasm", "run", "--agent", agent, "--", "sh", "-c", command], user="dev", cwd=cwd
    )


def works(box: Container, *commands: str) -> None:
    """Each of these acts is one that a run can do."""
    for command in commands:
        run(box, command).check()


def fails(box: Container, *commands: str) -> None:
    """None of these acts is, though their user could do each of them."""
    for command in commands:
        done = run(box, command)
        assert done.code not in (0, 125), done


# -- files


def test_a_closed_file_is_not_read_or_written_or_removed_and_others_are(box: Container) -> None:
    policy(box, HEAD + FILES + SANDBOX)
    fails(
        box,
        "cat ~/.ssh/id",
        "ls ~/.ssh",
        "echo x > ~/.ssh/new",
        "cat ~/.netrc",
        "cat ~/.netrc.old",
        "echo x > /srv/notes/new",
        "rm /srv/notes/a",
        "rm log",
        "mv log other",
    )
    works(box, "cat ~/.gitconfig", "cat /srv/notes/a", "echo x >> log", "echo x > new && rm new")
    box.run(
        f"cat {HOME}/.ssh/id && echo x > /srv/notes/new && rm /srv/notes/new", user="dev"
    ).check()


def test_what_is_read_only_in_a_writable_folder_cannot_be_moved_out_of_the_way(
    box: Container,
) -> None:
    policy(box, HEAD + SANDBOX)
    fails(
        box,
        "echo x > .git/hooks/pre",
        "echo x > .git/hooks/new",
        "rm -r .git/hooks",
        "mv .git/hooks .git/other",
        "mv .git .other",
        "rm .envrc",
        "echo x > x && mv x .envrc",
        "ln .git/hooks/pre link",
    )
    works(box, "echo x > .git/config", "mv .git/config .git/c && mv .git/c .git/config", "mv sub s")
    works(box, "mv s sub")


def test_a_file_that_is_not_there_yet_is_told_of_and_can_be_made(box: Container) -> None:
    policy(box, HEAD + SANDBOX)
    done = run(box, "echo x > missing && rm missing").check()
    assert f"{WORK}/missing does not exist, so the run may make it" in done.err


def test_a_run_does_not_start_in_a_folder_that_is_closed_to_it(box: Container) -> None:
    policy(box, HEAD + FILES.replace("~/.ssh/**", "~/work/**"))
    done = run(box, "true")
    assert done.code == 125 and "box/keys closes the working directory" in done.err
    policy(box, HEAD + FILES)
    works(box, "true")


def test_a_folder_in_what_must_not_be_written_to_is_not_writable(box: Container) -> None:
    policy(box, HEAD + FILES.replace("/srv/notes/**", "~/work/**"))
    done = run(box, "echo x > new")
    assert done.code != 0 and f"{WORK} is read-only, because box/notes closes" in done.err
    policy(box, HEAD + FILES)
    works(box, "echo x > new && rm new")


# -- programs


def test_a_denied_program_is_not_executed_whatever_way_it_is_called(box: Container) -> None:
    policy(box, HEAD + PROGRAMS)
    fails(
        box,
        "/usr/bin/whoami",
        "/bin/whoami",
        "/lib64/ld-linux-x86-64.so.2 /usr/bin/whoami",
        "/opt/tools/id",
        "exec /opt/tools/id",
    )
    works(box, "/usr/bin/id", "bin/id", "cat /usr/bin/whoami > /dev/null")
    box.run("whoami && /opt/tools/id", user="dev").check()


def test_no_mount_that_takes_execution_away_opens_anything_for_writing(box: Container) -> None:
    policy(box, HEAD + FILES + PROGRAMS + SANDBOX)
    mounts = run(box, "cut -d' ' -f5,6 /proc/self/mountinfo").check().out.splitlines()
    own = ("/tmp", "/var/tmp", "/dev", "/proc", "/sys/fs/fuse")
    writable = {
        place
        for place, options in (line.split() for line in mounts)
        if options.startswith("rw") and not place.startswith(own)
    }
    assert writable == {WORK, f"{WORK}/.git", f"{WORK}/log"}


# -- defaults that deny or allow


def test_with_exec_and_files_denied_only_what_rules_allow_is_left(box: Container) -> None:
    policy(box, STRICT)
    works(
        box,
        "cat ~/.gitconfig",
        "cat ~/.config/tool/a",
        "cat /etc/passwd > /dev/null",
        "bin/id",
        "echo x > here && cat here",
    )
    fails(
        box,
        "cat ~/.netrc",
        "cat ~/.config/other/a",
        "cat /srv/notes/a",
        "/usr/bin/id",
        "/lib64/ld-linux-x86-64.so.2 /usr/bin/id",
        "cp bin/id copy && ./copy",
        "cp bin/id /tmp/copy && /tmp/copy",
        "/usr/bin/python3 -c 1",
        "/opt/tools/id",
    )


def test_with_files_allowed_the_home_is_writable_and_the_system_is_not(box: Container) -> None:
    policy(
        box,
        HEAD
        + 'default = { file = "allow" }\n'
        + FILES
        + "[sandbox]\nread_only = ['~/.gitconfig']\n",
    )
    works(box, "echo x > ~/new && rm ~/new", "echo x > /srv/notes-not || true")
    fails(
        box, "echo x > ~/.gitconfig", "cat ~/.ssh/id", "echo x > /srv/notes/new", "echo x > /etc/x"
    )
    policy(box, HEAD + FILES)
    fails(box, "echo x > ~/new")


# -- the template that people begin with


def test_git_and_a_compiler_work_under_the_template_for_coding_agents(box: Container) -> None:
    box.raw(["rm", "-f", POLICY_FILE]).check()
    box.run(["aasm", "policy", "use", "coding-agent"]).check()
    try:
        shown = box.run(["aasm", "policy", "show"]).check().out
        assert "no-persistence" in shown and "sandbox.read_only" in shown
        project = f"{HOME}/project"
        box.run(f"git init -q {project} && touch {project}/.envrc", user="dev").check()
        done = run(
            box,
            "git config user.name; git -c user.name=a -c user.email=a@b.test commit -q --allow-empty -m x"
            " && git checkout -q -b next && echo 'int main(void){return 0;}' > a.c && cc a.c -o a"
            " && ./a && git add a.c && git status --short",
            cwd=project,
        ).check()
        assert done.out == "A  a.c\n?? .envrc\n?? a\n", done
        for command in (
            "echo x > .git/hooks/pre-commit",
            "git config core.hooksPath /tmp",
            "echo x >> .envrc",
            "echo x >> ~/.bashrc",
            "cat ~/.ssh/id",
            "su --version",
        ):
            assert run(box, command, cwd=project).code not in (0, 125), command
    finally:
        box.raw(["rm", "/etc/agent-assembly/policy.d/50-template.toml"]).check()


# -- what a run may cost, and what no host of this version can do


def test_memory_and_tasks_are_limits_of_the_unit(box: Container) -> None:
    policy(box, HEAD + '[sandbox]\nmemory = "512M"\ntasks = 64\n')
    process, name = background(box)
    shown = box.show(f"aa-agent-{name}.service", "MemoryMax", "TasksMax")
    assert (shown["MemoryMax"], shown["TasksMax"]) == (str(512 << 20), "64")
    end(box, process, name)


def test_user_namespaces_cannot_be_allowed_yet_and_no_run_starts(box: Container) -> None:
    policy(box, HEAD + '[sandbox]\nuser_namespaces = "allow"\n')
    done = run(box, "true")
    assert done.code == 125 and "rung lsm or fmod_ret" in done.err
    policy(box, HEAD + '[sandbox]\nuser_namespaces = "deny"\n')
    works(box, "true")


# -- a policy that changes under a run


def background(box: Container, agent: str = "default") -> tuple[Any, str]:
    """A run that goes on, and its id."""
    before = {r["id"] for r in listed(box)}
    argv = ["aasm", "run", "--agent", agent, "--", "sleep", "600"]
    process = box.popen(argv, user="dev", cwd=WORK)
    name = eventually(
        lambda: next(
            (r["id"] for r in listed(box) if r["id"] not in before and r["state"] == "running"),
            None,
        ),
        timeout=20,
        what="the run is running",
    )
    return process, str(name)


def end(box: Container, process: Any, name: str) -> None:
    box.run(["aasm", "runs", "kill", name]).check()
    process.wait(20)


def listed(box: Container) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        box.run(["aasm", "runs", "list", "--json"]).check().out
    )
    return found


def pending(box: Container) -> list[str]:
    shown = [r["id"] for r in listed(box) if r["pending"]]
    told = json.loads(box.run(["aasm", "status", "--json"]).out)
    assert told["pending"] == shown
    return shown


def test_a_run_keeps_its_sandbox_over_a_reload_and_is_shown_as_pending(box: Container) -> None:
    policy(box, HEAD + SANDBOX)
    process, name = background(box)
    assert pending(box) == []
    policy(box, HEAD + FILES + SANDBOX)
    assert pending(box) == [name]
    assert "pending" in box.run(["aasm", "runs", "list"]).check().out
    assert "1 run has the sandbox of an earlier one" in records(box, target="policy")[-1]["reason"]
    box.systemctl("restart", "aa-gateway.service").check()
    assert pending(box) == [name]
    fails(box, "cat ~/.ssh/id")
    policy(box, HEAD + SANDBOX)
    assert pending(box) == []
    end(box, process, name)


# -- what is only detected


def test_what_no_mount_can_say_is_detected_by_the_kernel_layer(box: Container) -> None:
    """A pattern with a wildcard in the middle: the program runs, and the log says what the policy says."""
    await_ebpf(box)
    policy(
        box,
        HEAD + '[[rule]]\nid = "who"\neffect = "deny"\nexec = { paths = ["/usr/**/who*"] }\n'
        '[[rule]]\nid = "env"\neffect = "deny"\nfile = { paths = ["~/**/secret.env"] }\n',
    )
    before = last_sequence(box)
    run(box, "/usr/bin/whoami; echo x > sub/secret.env; rm sub/secret.env", agent="watched").check()

    def seen(**fields: str) -> list[tuple[str, str]]:
        found = [r for r in records(box, **fields) if r["seq"] > before]
        return [(r["would"], r["rule"]) for r in found]

    eventually(lambda: seen(kind="exec", target="/usr/bin/whoami"), what="the exec is recorded")
    assert seen(kind="exec", target="/usr/bin/whoami") == [("deny", "box/who")]
    assert ("allow", "<default>") in seen(kind="exec")
    eventually(lambda: seen(kind="file.unlink"), what="the removal is recorded")
    assert ("deny", "box/env") in seen(kind="file.unlink")
    assert ("deny", "box/env") in seen(kind="file.open")


def await_ebpf(box: Container) -> None:
    eventually(
        lambda: box.show("aa-ebpf.service", "ActiveState")["ActiveState"] == "active",
        timeout=20,
        what="aa-ebpf is active",
    )
