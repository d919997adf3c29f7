// What the runner gives an action and takes from it: inputs, outputs, state and the commands it reads from the log.
import { appendFileSync } from 'node:fs'
import { randomUUID } from 'node:crypto'
import { EOL } from 'node:os'

/** An input as the workflow gave it, without blanks around it. */
export const input = (name) => (process.env[`INPUT_${name.toUpperCase().replaceAll(' ', '_')}`] ?? '').trim()

/** An input that is a list: separated by blanks, commas or lines. */
export const list = (name) => input(name).split(/[\s,]+/).filter(Boolean)

/** An input that is true or false. */
export function flag(name) {
  const text = input(name).toLowerCase()
  if (text === 'true') return true
  if (text === 'false' || text === '') return false
  throw new Error(`the input ${name} is true or false, not ${JSON.stringify(text)}`)
}

// The runner's files take NAME<<DELIMITER. The delimiter is random, so that no value can end its own block.
function append(file, name, value) {
  if (!process.env[file]) return
  const mark = `culvert_${randomUUID()}`
  appendFileSync(process.env[file], `${name}<<${mark}${EOL}${value}${EOL}${mark}${EOL}`)
}

export const output = (name, value) => append('GITHUB_OUTPUT', name, value)
export const exportEnv = (name, value) => append('GITHUB_ENV', name, value)
export const saveState = (name, value) => append('GITHUB_STATE', name, value)
export const state = (name) => process.env[`STATE_${name}`] ?? ''
export const summary = (markdown) => process.env.GITHUB_STEP_SUMMARY && appendFileSync(process.env.GITHUB_STEP_SUMMARY, markdown)

// Workflow commands, escaped as GitHub's toolkit does, so that no text from elsewhere starts a command of its own.
const escape = (text) => String(text).replaceAll('%', '%25').replaceAll('\r', '%0D').replaceAll('\n', '%0A')
export const say = (text) => process.stdout.write(String(text).replaceAll(/^::/gm, ' ::') + EOL)
export const group = (title) => process.stdout.write(`::group::${escape(title)}${EOL}`)
export const endGroup = () => process.stdout.write(`::endgroup::${EOL}`)
export const error = (text) => process.stdout.write(`::error title=culvert::${escape(text)}${EOL}`)
export const warning = (text) => process.stdout.write(`::warning title=culvert::${escape(text)}${EOL}`)
export const mask = (text) => text && process.stdout.write(`::add-mask::${escape(text)}${EOL}`)
export const debug = (text) => process.stdout.write(`::debug::${escape(text)}${EOL}`)
