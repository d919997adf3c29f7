// Leaves: writes the job's summary and ends the tunnel. Nothing here ever fails the job.
import { spawnSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { debug, flag, state, summary, warning } from './runner.mjs'

const wait = 15_000 // ms for each command

function culvert(...args) {
  const { status, stdout, error } = spawnSync(state('program'), [...args, '--name', state('name'), '--json'], { encoding: 'utf8', timeout: wait, maxBuffer: 4 << 20 })
  if (error) debug(`${args[0]}: ${error.message}`)
  try {
    return { status, value: JSON.parse(stdout) }
  } catch {
    return { status, value: undefined }
  }
}

// Text from elsewhere goes into a table cell as text: no markup, no new row.
const cell = (text) => '`' + String(text ?? '').replaceAll(/[`|\r\n]/g, ' ').trim().slice(0, 200) + '`'

export function size(bytes) {
  const units = ['B', 'kB', 'MB', 'GB', 'TB']
  let unit = 0
  for (; bytes >= 1000 && unit < units.length - 1; unit++) bytes /= 1000
  return `${unit === 0 ? bytes : bytes.toFixed(1)} ${units[unit]}`
}

/** The summary in Markdown: what `culvert status --json` says, as a reader of the run wants it. */
export function describe(name, status) {
  const rows = [['state', cell(status.state)]]
  if (status.path) rows.push(['path', `${cell(status.path.kind)}, ${Number(status.path.rtt_ms).toFixed(1)} ms`])
  if (status.gateway) rows.push(['gateway', cell(status.gateway)])
  if (status.rules?.length) rows.push(['rules', status.rules.map(cell).join(' ')])
  rows.push(['received, sent', `${size(status.rx_bytes ?? 0)}, ${size(status.tx_bytes ?? 0)}`])
  if (status.rejoins) rows.push(['joined again', String(status.rejoins)])
  if (status.problem) rows.push(['last problem', cell(`${status.problem.message ?? status.problem.detail ?? ''} [${status.problem.code ?? ''}]`)])
  const text = `### Culvert: ${cell(name)} in network ${cell(status.network)}\n\n| | |\n|---|---|\n${rows.map((r) => `| ${r.join(' | ')} |`).join('\n')}\n`
  return text + flows(status) + '\n'
}

const refused = ['denied', 'limited']
const failed = { refused: 'refused', unreachable: 'unreachable', timeout: 'no answer', 'no-name': 'no such name' }

// The line that would let a denied flow through. A name that was refused is all that the gateway has seen of it: no port.
const line = ({ proto, target }) => `allow: ["${proto === 'dns' ? `tcp ${target}:PORT` : `${proto} ${target}`}"]`

/** What was reached and what was denied, in Markdown. */
function flows({ reached = [], more = 0 }) {
  const table = (head, rows) => (rows.length ? `\n| ${head.join(' | ')} |\n|${'---|'.repeat(head.length)}\n${rows.map((r) => `| ${r.join(' | ')} |`).join('\n')}\n` : '')
  const through = reached.filter((r) => !refused.includes(r.verdict)).map((r) =>
    [cell(`${r.proto} ${r.target}`), `${Number(r.flows)}${failed[r.cause] ? `, the last: ${failed[r.cause]}` : ''}`, `${size(r.bytes_down ?? 0)}, ${size(r.bytes_up ?? 0)}`])
  const turned = reached.filter((r) => refused.includes(r.verdict)).map((r) =>
    [cell(r.proto === 'dns' ? `the name ${r.target}` : `${r.proto} ${r.target}`), String(Number(r.flows)), cell(r.verdict === 'denied' ? line(r) : r.reason)])
  const others = more > 0 ? `\n${Number(more)} flows to further targets.\n` : ''
  return table(['reached', 'flows', 'received, sent'], through) + table(['denied', 'times', 'what a rule would need'], turned) + others
}

function main() {
  if (!state('program')) return // main never came so far
  const { value: status } = culvert('status')
  const shown = status?.state ? status : undefined
  if (shown && flag('summary')) summary(describe(state('name'), shown))
  const down = culvert('down')
  if (down.status !== 0 && down.value?.code !== 'not-up') warning(`the tunnel did not end in good order; it goes with the machine, and its lease in minutes${down.value?.detail ? `: ${down.value.detail}` : ''}`)
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  try {
    main()
  } catch (err) {
    warning(err.message)
  }
}
