// Joins: gets the client, starts it, and ends when the tunnel is usable. The client itself asks for the token, goes on in the background, and
// says in annotations of its own what went wrong.
import { spawn, spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { fileURLToPath } from 'node:url'
import { client } from './client.mjs'
import { endGroup, error, exportEnv, flag, group, input, list, mask, output, saveState, say, warning } from './runner.mjs'

// What the client may read besides its own variables. Under sudo only these are passed on: a job's other secrets stay where they are.
const passed = ['ACTIONS_ID_TOKEN_REQUEST_URL', 'ACTIONS_ID_TOKEN_REQUEST_TOKEN', 'ACTIONS_RUNTIME_URL', 'ACTIONS_RESULTS_URL', 'ACTIONS_CACHE_URL',
  'GITHUB_SERVER_URL', 'GITHUB_API_URL', 'GITHUB_GRAPHQL_URL', 'GITHUB_ACTIONS', 'RUNNER_ENVIRONMENT', 'RUNNER_TEMP', 'XDG_RUNTIME_DIR', 'SSL_CERT_FILE',
  'SSL_CERT_DIR', 'HTTPS_PROXY', 'HTTP_PROXY', 'NO_PROXY', 'https_proxy', 'http_proxy', 'no_proxy']

const hash = (...texts) => createHash('sha256').update(texts.join('\0')).digest('hex').slice(0, 8)

/** Which runner of a self-hosted machine this is, and which of its jobs, as RUNNER/JOB; '' where a machine is one job's. */
export function jobName(env = process.env) {
  if (env.RUNNER_ENVIRONMENT === 'github-hosted' || !env.RUNNER_TRACKING_ID) return ''
  return `${hash(env.RUNNER_NAME, env.RUNNER_TEMP)}/${hash(env.RUNNER_TRACKING_ID)}`
}

/** The tunnel's name. Runners of one self-hosted machine may run as one user, so there it has the job in it. */
export function tunnelName(env = process.env) {
  const base = input('name') || input('network') || 'culvert'
  const job = jobName(env).split('/')[1]
  return job ? `${base.slice(0, 23)}-${job}` : base
}

/** The client's settings: an input becomes the variable of the flag with its name. */
export function settings() {
  const all = {
    CULVERT_COORDINATOR: input('coordinator'),
    CULVERT_NETWORK: input('network'),
    CULVERT_MODE: input('mode'),
    CULVERT_WAIT_FOR: list('wait-for').join(','),
    CULVERT_GATEWAY_KEY: list('gateway-keys').join(','),
    CULVERT_DIRECT: list('direct').join(','),
    CULVERT_FORWARD: list('forward').join(','),
    CULVERT_TIMEOUT: input('timeout'),
    CULVERT_INSECURE_HTTP: flag('insecure-http') ? 'true' : '',
    CULVERT_LOG_LEVEL: input('log-level') || (process.env.RUNNER_DEBUG === '1' ? 'debug' : ''),
    CULVERT_LOG_FILE: input('log-file'),
    CULVERT_NAME: tunnelName(),
    CULVERT_JOB: jobName(),
    CULVERT_SHARED: flag('shared') ? 'true' : '',
  }
  return Object.fromEntries(Object.entries(all).filter(([, value]) => value !== ''))
}

/** The command in front of the client: sudo where mode and machine call for it and it asks for no password. */
export function elevation(env) {
  if (!flag('sudo') || input('mode') === 'proxy' || process.platform === 'win32' || process.getuid() === 0) return []
  if (spawnSync('sudo', ['-n', 'true'], { stdio: 'ignore' }).status !== 0) return []
  const names = Object.keys(env).filter((name) => passed.includes(name) || name.startsWith('CULVERT_'))
  return ['sudo', '-n', `--preserve-env=${names.join(',')}`]
}

// The only secrets that reach the action as text are passwords in URLs. Nothing here prints them; masked, nothing else does either.
export function maskPasswords(env = process.env) {
  for (const text of [input('mirror'), ...passed.filter((name) => /_PROXY$/i.test(name)).map((name) => env[name])]) {
    const password = URL.canParse(text ?? '') && new URL(text).password
    for (const form of new Set(password ? [password, decodeURIComponent(password)] : [])) mask(form)
  }
}

async function main() {
  maskPasswords()
  if (!input('coordinator')) throw new Error('the input coordinator is missing; write with: {coordinator: https://…}')
  const program = await client()
  const env = { ...process.env, ...settings() }
  saveState('program', program)
  saveState('name', env.CULVERT_NAME)
  const [command, ...args] = [...elevation(env), program, 'up', '--json']
  const talkative = ['debug', 'info'].includes(env.CULVERT_LOG_LEVEL)
  if (talkative) group('culvert up')
  const child = spawn(command, args, { env, stdio: ['ignore', 'pipe', 'inherit'] })
  const ended = new Promise((resolve, reject) => child.on('error', reject).on('close', (code) => resolve(code ?? 1)))
  // A signal cannot reach a child of sudo from here, but every tunnel of this user takes `down` at any time.
  let cancelled = false
  const cancel = () => {
    cancelled = true
    child.kill('SIGINT')
    spawn(program, ['down', '--name', env.CULVERT_NAME], { stdio: 'ignore' }).on('error', () => {})
  }
  process.on('SIGINT', cancel).on('SIGTERM', cancel)
  let text = ''
  child.stdout.setEncoding('utf8').on('data', (chunk) => (text += chunk))
  const code = await ended
  if (talkative) endGroup()
  if (cancelled || code !== 0) {
    process.exitCode = code || 1 // the client has said why
    return
  }
  const ready = JSON.parse(text)
  report(ready, env.CULVERT_NAME)
}

function report(ready, name) {
  for (const [key, value] of Object.entries({
    address: ready.address, gateway: ready.gateway, path: ready.path.kind, session: ready.session, proxy: ready.proxy ?? '',
  })) output(key, value)
  const names = new Set((process.env.CULVERT_NAME ?? '').split(',').filter(Boolean)).add(name) // of earlier steps, which joined other networks
  exportEnv('CULVERT_NAME', [...names].join(',')) // status, check, exec and down of later steps find them
  for (const left of ready.left_out ?? []) warning(`${left} on this runner: granted, but directly connected, so it stays outside the tunnel`)
  if (ready.proxy && flag('export-proxy')) {
    const variables = { https_proxy: `http://${ready.proxy}`, http_proxy: `http://${ready.proxy}`, all_proxy: `socks5h://${ready.proxy}`,
      no_proxy: [process.env.NO_PROXY, 'localhost,127.0.0.1,::1'].filter(Boolean).join(',') }
    for (const [variable, value] of Object.entries(variables)) { // some programs read one spelling, some the other
      exportEnv(variable.toUpperCase(), value)
      if (process.platform !== 'win32') exportEnv(variable, value)
    }
  }
  say(`culvert: up in network ${ready.network} as ${ready.address}, gateway ${ready.gateway}, ${ready.path.kind} path, ${Math.round(ready.timings.total_ms)} ms`)
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  main().catch((err) => {
    error(err.message)
    process.exitCode = 1
  })
}
