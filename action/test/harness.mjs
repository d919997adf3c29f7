// Runs the action's steps as the runner does: a process each, inputs and files by environment.
import { spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { cpSync, existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import http from 'node:http'
import { tmpdir } from 'node:os'
import path from 'node:path'
import { gzipSync } from 'node:zlib'
import { fileURLToPath } from 'node:url'

export const sha256 = (data) => createHash('sha256').update(data).digest('hex')
export const platform = `${process.platform}-${{ x64: 'amd64', arm64: 'arm64' }[process.arch]}`

/** A runner in a folder of its own, gone after the test. */
export function runner(t) {
  const home = mkdtempSync(path.join(tmpdir(), 'culvert-action-'))
  t.after(() => rmSync(home, { recursive: true, force: true }))
  const file = (name) => path.join(home, name)
  const read = (name) => (existsSync(file(name)) ? readFileSync(file(name), 'utf8') : '')
  cpSync(fileURLToPath(new URL('..', import.meta.url)), file('action'), { recursive: true, filter: (from) => !from.includes('/test') })
  return {
    home, file, read,
    /** Makes the copy of the action a release's. */
    release: (version, digest) => writeFileSync(file('action/release.json'), JSON.stringify({ version, sha256: { [platform]: digest } })),
    /** Runs main or post; inputs by name. */
    run(step, inputs = {}, more = {}) {
      const env = { PATH: process.env.PATH, HOME: home, GITHUB_ACTIONS: 'true', RUNNER_ENVIRONMENT: 'github-hosted', RUNNER_TOOL_CACHE: file('tools'), RUNNER_TEMP: home,
        GITHUB_OUTPUT: file('output'), GITHUB_ENV: file('env'), GITHUB_STATE: file('state'), GITHUB_STEP_SUMMARY: file('summary') }
      for (const [name, value] of Object.entries({ mode: 'proxy', sudo: 'true', summary: 'true', ...inputs })) env[`INPUT_${name.toUpperCase()}`] = value
      for (const [name, value] of Object.entries(pairs(read('state')))) env[`STATE_${name}`] = value
      const child = spawn(process.execPath, [file(`action/${step}.mjs`)], { env: { ...env, ...more }, cwd: home })
      let out = ''
      child.stdout.on('data', (d) => (out += d))
      child.stderr.on('data', (d) => (out += d))
      const done = new Promise((resolve) => child.on('close', (code, signal) => resolve({ code, signal, out })))
      return Object.assign(done, { child, soFar: () => out })
    },
  }
}

/** What a NAME<<DELIMITER file says. */
export function pairs(text) {
  const all = {}
  for (const [, name, , value] of text.matchAll(/^(\w+)<<(\S+)\n([\s\S]*?)\n\2$/gm)) all[name] = value
  return all
}

/** A stand-in for the client: a script that writes down how it was called and answers as told. */
export function stub(answers, log) {
  return Buffer.from(`#!${process.execPath}
const fs = require('node:fs')
const answers = ${JSON.stringify(answers)}
const kept = Object.fromEntries(Object.entries(process.env).filter(([n]) => n.startsWith('CULVERT_')))
fs.appendFileSync(${JSON.stringify(log)}, JSON.stringify({ args: process.argv.slice(2), env: kept }) + '\\n')
const { out, code, stay } = answers[process.argv[2]] ?? { code: 9 }
if (out) console.log(typeof out === 'string' ? out : JSON.stringify(out))
if (stay) { setInterval(() => {}, 1000); process.on('SIGINT', () => process.exit(1)) } else process.exitCode = code ?? 0
`)
}

export const ready = { session: 'sess-1', network: 'corp', address: '198.18.0.2', gateway: 'gw-1', proxy: '127.0.0.1:1080', mode: 'proxy',
  path: { kind: 'reflexive', remote: '192.0.2.1:51820', rtt_ms: 1.5 }, timings: { total_ms: 49.4 } }

/** A web server on loopback: handlers by path, each a function of (request, response, nth call). */
export async function web(t, handlers) {
  const calls = []
  const server = http.createServer((req, res) => {
    calls.push(req.url)
    const handler = handlers[req.url]
    if (!handler) return res.writeHead(404).end()
    handler(req, res, calls.filter((u) => u === req.url).length)
  })
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve))
  t.after(() => new Promise((resolve) => (server.closeAllConnections(), server.close(resolve))))
  return { url: `http://127.0.0.1:${server.address().port}`, calls }
}

export const gz = (data) => (_, res) => res.end(gzipSync(data))
