// Finds the client: one's own binary, the tool cache, this version's release or a mirror of it, the coordinator. Whatever the source,
// the program is run only if its SHA-256 is the one that this action pins.
import { createHash } from 'node:crypto'
import { accessSync, chmodSync, constants, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { gunzipSync } from 'node:zlib'
import http from 'node:http'
import https from 'node:https'
import path from 'node:path'
import { setTimeout as pause } from 'node:timers/promises'
import { debug, input, say } from './runner.mjs'

const releases = 'https://github.com/culvertnet/culvert/releases/download'
const limit = { archive: 32 << 20, binary: 64 << 20 } // bytes
const tries = 4 // for faults that may pass
const patience = 30_000 // ms without a byte

/** The platform as releases name it: linux-amd64, darwin-arm64 … */
export function platform() {
  const os = { linux: 'linux', darwin: 'darwin', win32: 'windows' }[process.platform]
  const arch = { x64: 'amd64', arm64: 'arm64' }[process.arch]
  if (!os || !arch) throw new Error(`there is no client for ${process.platform} on ${process.arch}; build one and give its path as the input binary`)
  return `${os}-${arch}`
}

/** Path of a client that may be run. */
export async function client(release = pinned()) {
  if (input('binary')) return own(input('binary'))
  const { version, sha256 } = wanted(release)
  const suffix = process.platform === 'win32' ? '.exe' : ''
  const folder = path.join(process.env.RUNNER_TOOL_CACHE || process.env.RUNNER_TEMP || '.', 'culvert', version, platform())
  const program = path.join(folder, `culvert${suffix}`)
  if (matches(read(program), sha256)) return debug(`client from the tool cache: ${program}`), program
  const binary = await download(sources(version), sha256)
  mkdirSync(folder, { recursive: true })
  const fresh = path.join(folder, `.culvert-${process.pid}${suffix}`)
  try {
    writeFileSync(fresh, binary, { mode: 0o755 })
    chmodSync(fresh, 0o755)
    renameSync(fresh, program) // whole or not at all: other jobs of this machine look here too
  } finally {
    rmSync(fresh, { force: true })
  }
  return program
}

/** The release that this copy of the action belongs to: {version, sha256: {platform: digest}}. */
export const pinned = () => JSON.parse(readFileSync(new URL('release.json', import.meta.url), 'utf8'))

function own(file) {
  const program = path.resolve(file)
  try {
    accessSync(program, constants.X_OK)
  } catch {
    throw new Error(`the input binary names ${program}, which is no program that this user may run`)
  }
  return program
}

function wanted(release) {
  const version = input('version').replace(/^v/, '') || release.version
  const sha256 = (version === release.version && release.sha256?.[platform()]) || input('sha256').toLowerCase()
  if (!version) throw new Error('this copy of the action belongs to no release; use a released one such as culvertnet/culvert@v1, or give the input binary')
  if (!/^\d+\.\d+\.\d+[-.+\w]*$/.test(version)) throw new Error(`${JSON.stringify(version)} is no version; write it as 1.2.3`)
  if (!/^[0-9a-f]{64}$/.test(sha256)) throw new Error(`there is no digest for version ${version} on ${platform()}; leave version out, or give the input sha256 too`)
  return { version, sha256 }
}

// sources are where the client may be, the best one first.
function sources(version) {
  const folders = [input('mirror') || `${releases}/v${version}`, `${input('coordinator').replace(/\/+$/, '')}/dl/v${version}`]
  return folders.filter((f) => /^https?:\/\//.test(f)).map((f) => `${f.replace(/\/+$/, '')}/culvert-${platform()}.gz`)
}

// shown is a URL without what may be secret in it: user, password and query.
function shown(url) {
  const { origin, pathname } = new URL(url)
  return origin + pathname
}

// download asks every source in turn before it asks one again, so that one which is blocked costs one time limit.
async function download(urls, sha256) {
  const faults = new Map()
  const hopeless = new Set()
  for (let attempt = 1; attempt <= tries && hopeless.size < urls.length; attempt++) {
    if (attempt > 1) await pause(125 * 2 ** attempt * (0.5 + Math.random()))
    for (const url of urls.filter((u) => !hopeless.has(u))) {
      try {
        const binary = gunzipSync(await get(url), { maxOutputLength: limit.binary })
        if (!matches(binary, sha256)) throw new Error(`its SHA-256 is not the pinned ${sha256}`)
        say(`culvert: client from ${new URL(url).host}`)
        return binary
      } catch (err) {
        debug(`${shown(url)}, attempt ${attempt}: ${err.message}`)
        faults.set(url, err.message)
        if (err.permanent) hopeless.add(url)
      }
    }
  }
  const tried = [...faults].map(([url, fault]) => `from ${shown(url)}: ${fault}`).join('\n')
  throw new Error(`the client cannot be had\n${tried}\nallow one of these hosts, give the input mirror, or bring the client along as the input binary`)
}

// get fetches a URL, through HTTPS_PROXY where that is set (Node's agents read it when given the environment).
function get(url, redirects = 5) {
  const web = url.startsWith('https:') ? https : http
  const permanent = (message) => Object.assign(new Error(message), { permanent: true })
  return new Promise((resolve, reject) => {
    const request = web.get(url, { agent: new web.Agent({ proxyEnv: process.env }), timeout: patience }, (response) => {
      const { statusCode: status, headers } = response
      if (status >= 300 && status < 400 && headers.location) {
        response.resume()
        const next = new URL(headers.location, url)
        if (redirects === 0) return reject(permanent('too many redirects'))
        if (url.startsWith('https:') && next.protocol !== 'https:') return reject(permanent('redirected away from https'))
        return get(next.href, redirects - 1).then(resolve, reject)
      }
      if (status !== 200) {
        response.resume()
        const again = status === 408 || status === 429 || status >= 500
        return reject(again ? new Error(`HTTP ${status}`) : permanent(`HTTP ${status}`))
      }
      const chunks = []
      let size = 0
      response.on('data', (chunk) => {
        chunks.push(chunk)
        if ((size += chunk.length) > limit.archive) response.destroy(permanent('larger than any client'))
      })
      response.on('end', () => resolve(Buffer.concat(chunks)))
      response.on('error', reject)
      response.on('close', () => response.complete || reject(new Error('cut off')))
    })
    request.on('timeout', () => request.destroy(new Error(`no answer for ${patience / 1000} s`)))
    request.on('error', reject)
  })
}

function read(file) {
  try {
    return readFileSync(file)
  } catch {
    return undefined
  }
}

const matches = (data, sha256) => data !== undefined && createHash('sha256').update(data).digest('hex') === sha256
