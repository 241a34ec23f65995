#!/bin/bash
# What RunPod's images do when they start, and their users rely on: /pre_start.sh, an sshd for PUBLIC_KEY, the variables
# in /etc/rp_environment, /post_start.sh, and then sleep. EMULATED_* say what stands in for the image here.
set -u
export_env_vars() {
  printenv | grep -E '^[A-Z_][A-Z0-9_]*=' | grep -vE '^(EMULATED_|PUBLIC_KEY=|PWD=|HOME=|SHLVL=|_=)' |
    while IFS='=' read -r name value; do printf 'export %s=%q\n' "$name" "$value"; done >"$EMULATED_ETC/rp_environment"
  grep -qs rp_environment ~/.bashrc || echo "[ -f '$EMULATED_ETC/rp_environment' ] && source '$EMULATED_ETC/rp_environment'" >>~/.bashrc
}

setup_ssh() {
  [ -n "${PUBLIC_KEY:-}" ] && [ -n "${EMULATED_SSH_PORT:-}" ] || return 0
  mkdir -p ~/.ssh && echo "$PUBLIC_KEY" >>~/.ssh/authorized_keys && chmod 700 ~/.ssh && chmod 600 ~/.ssh/authorized_keys
  ssh-keygen -q -t ed25519 -N '' -f "$EMULATED_ETC/ssh/ssh_host_ed25519_key"
  local penalties=()  # OpenSSH 9.8 and later shut out who asks often, and waiting for a pod is asking often
  "$EMULATED_SSHD" -t -f "$EMULATED_ETC/ssh/sshd_config" -o PerSourcePenalties=no 2>/dev/null && penalties=(-o PerSourcePenalties=no)
  "$EMULATED_SSHD" -f "$EMULATED_ETC/ssh/sshd_config" "${penalties[@]}" || exit 1  # the port is taken: start again on another
}

[ -f "$EMULATED_ROOT/pre_start.sh" ] && bash "$EMULATED_ROOT/pre_start.sh"
export_env_vars
sleep "${EMULATED_SSH_DELAY:-0}"
setup_ssh
[ -f "$EMULATED_ROOT/post_start.sh" ] && bash "$EMULATED_ROOT/post_start.sh"
echo 'Start script(s) finished, Pod is ready to use.'
exec sleep infinity
