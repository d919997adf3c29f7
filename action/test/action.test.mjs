import assert from 'node:assert/strict'
import { chmodSync, existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import path from 'node:path'
import { test } from 'node:test'
import { gz, pairs, platform, ready, runner, sha256, stub, web } from './harness.mjs'

const asset = `/culvert-${platform}.gz`
const coordinator = 'https://127.0.0.1:9' // never asked: nothing listens there

function withBinary(r, answers) {
  const program = r.file('own-culvert')
  writeFileSync(program, stub(answers, r.file('calls')))
  chmodSync(program, 0o755)
  return { coordinator, binary: program }
}

const calls = (r) => r.read('calls').trim().split('\n').filter(Boolean).map((line) => JSON.parse(line))

test('up: inputs become settings, the result becomes outputs', async (t) => {
  const r = runner(t)
  const inputs = withBinary(r, { up: { out: ready } })
  const { code, out } = await r.run('main', { ...inputs, network: 'corp', 'wait-for': 'db:5432, web:443\nmq:5672', 'gateway-keys': 'K1 K2', timeout: '90s', forward: '5432:db:5432\n8443:web:443', 'export-proxy': 'true' })
  assert.equal(code, 0, out)
  const [call] = calls(r)
  assert.deepEqual(call.args, ['up', '--json'])
  assert.deepEqual(call.env, { CULVERT_COORDINATOR: coordinator, CULVERT_NETWORK: 'corp', CULVERT_MODE: 'proxy', CULVERT_WAIT_FOR: 'db:5432,web:443,mq:5672',
    CULVERT_GATEWAY_KEY: 'K1,K2', CULVERT_FORWARD: '5432:db:5432,8443:web:443', CULVERT_TIMEOUT: '90s', CULVERT_NAME: 'corp' })
  assert.deepEqual(pairs(r.read('output')), { address: '198.18.0.2', gateway: 'gw-1', path: 'reflexive', session: 'sess-1', proxy: '127.0.0.1:1080' })
  const env = pairs(r.read('env'))
  assert.equal(env.HTTPS_PROXY, 'http://127.0.0.1:1080')
  assert.equal(env.ALL_PROXY, 'socks5h://127.0.0.1:1080')
  assert.equal(env.CULVERT_NAME, 'corp')
})

test('a long log is folded, and only asked for', async (t) => {
  for (const [more, level] of [[{}, undefined], [{ RUNNER_DEBUG: '1' }, 'debug']]) {
    const r = runner(t)
    const { code, out } = await r.run('main', withBinary(r, { up: { out: ready } }), more)
    assert.equal(code, 0, out)
    assert.equal(calls(r)[0].env.CULVERT_LOG_LEVEL, level)
    assert.equal(/^::group::culvert up\n(.*\n)*::endgroup::$/m.test(out), level === 'debug', out)
  }
})

test('proxy variables stay out of later steps unless asked for', async (t) => {
  const r = runner(t)
  await r.run('main', withBinary(r, { up: { out: ready } }))
  assert.deepEqual(pairs(r.read('env')), { CULVERT_NAME: 'culvert' })
})

test('a password in a URL is masked and printed nowhere', async (t) => {
  const r = runner(t)
  r.release('1.2.3', sha256('x'))
  const { code, out } = await r.run('main', { coordinator, mirror: 'http://bot:s3cr%2Ft@127.0.0.1:9/releases?key=hidden' }, { RUNNER_DEBUG: '1', https_proxy: 'http://u:hunter2@127.0.0.1:9' })
  assert.equal(code, 1)
  const [masks, rest] = [out.split('\n').filter((l) => l.startsWith('::add-mask::')), out.split('\n').filter((l) => !l.startsWith('::add-mask::')).join('\n')]
  assert.deepEqual(masks, ['::add-mask::s3cr%252Ft', '::add-mask::s3cr/t', '::add-mask::hunter2'])
  assert.match(rest, /from http:\/\/127\.0\.0\.1:9\/releases/)
  assert.doesNotMatch(rest, /s3cr|hunter2|hidden/)
})

test('steps that join several networks leave all their names to later ones, and say what stays with the runner', async (t) => {
  const r = runner(t)
  const { out } = await r.run('main', { ...withBinary(r, { up: { out: { ...ready, left_out: ['172.17.0.0/16 to docker0'] } } }), network: 'lab' }, { CULVERT_NAME: 'corp' })
  assert.equal(pairs(r.read('env')).CULVERT_NAME, 'corp,lab')
  assert.equal(calls(r)[0].env.CULVERT_NAME, 'lab')
  assert.match(out, /^::warning title=culvert::172\.17\.0\.0\/16 to docker0 on this runner/m)
})

test('the jobs of one runner can tell what an earlier one has left', async (t) => {
  const jobs = []
  for (const more of [{ RUNNER_NAME: 'one', RUNNER_TRACKING_ID: 'a' }, { RUNNER_NAME: 'one', RUNNER_TRACKING_ID: 'b' }, { RUNNER_NAME: 'two', RUNNER_TRACKING_ID: 'c' }]) {
    const r = runner(t)
    await r.run('main', withBinary(r, { up: { out: ready } }), { RUNNER_ENVIRONMENT: 'self-hosted', RUNNER_TEMP: '/tmp', ...more })
    jobs.push(calls(r)[0].env.CULVERT_JOB.split('/'))
  }
  assert.equal(jobs[0][0], jobs[1][0])
  assert.notEqual(jobs[0][1], jobs[1][1])
  assert.notEqual(jobs[1][0], jobs[2][0])
})

test('a failed up fails the step with the client\'s own exit code', async (t) => {
  const r = runner(t)
  const { code } = await r.run('main', withBinary(r, { up: { out: { code: 'denied', detail: 'no' }, code: 3 } }))
  assert.equal(code, 3)
  assert.equal(r.read('output'), '')
})

test('two jobs of one self-hosted machine get tunnels of their own', async (t) => {
  const names = []
  for (const RUNNER_TRACKING_ID of ['github_a', 'github_b', 'github_a']) {
    const r = runner(t)
    await r.run('main', withBinary(r, { up: { out: ready } }), { RUNNER_ENVIRONMENT: 'self-hosted', RUNNER_TRACKING_ID })
    names.push(pairs(r.read('env')).CULVERT_NAME)
  }
  assert.equal(names[0], names[2])
  assert.notEqual(names[0], names[1])
  assert.match(names[0], /^culvert-[0-9a-f]{8}$/)
})

test('cancelling ends a client that is still joining', { timeout: 60_000 }, async (t) => {
  const r = runner(t)
  const step = r.run('main', withBinary(r, { up: { stay: true }, down: {} }))
  while (!existsSync(r.file('calls'))) await new Promise((resolve) => setTimeout(resolve, 20))
  step.child.kill('SIGINT')
  const { code } = await step
  assert.equal(code, 1)
})

test('bad inputs are named', async (t) => {
  for (const [inputs, says] of [
    [{}, /input coordinator is missing/],
    [{ coordinator, binary: '/nonexistent/culvert' }, /input binary names \/nonexistent\/culvert/],
    [{ coordinator }, /belongs to no release/],
    [{ coordinator, version: '../../etc', sha256: 'a'.repeat(64) }, /is no version/],
    [{ coordinator, version: '1.2.3' }, /no digest for version 1\.2\.3/],
  ]) {
    const { code, out } = await runner(t).run('main', inputs)
    assert.equal(code, 1)
    assert.match(out, /^::error title=culvert::/m)
    assert.match(out, says)
  }
})

test('the client is fetched, checked, and taken from the tool cache the next time', async (t) => {
  const r = runner(t)
  const program = stub({ up: { out: ready } }, r.file('calls'))
  const server = await web(t, { [asset]: (req, res, n) => (n === 1 ? res.writeHead(503).end() : gz(program)(req, res)) })
  r.release('1.2.3', sha256(program))
  for (const expected of [2, 2]) { // a fault that passes, then the cache
    const { code, out } = await r.run('main', { coordinator, mirror: `${server.url}/` })
    assert.equal(code, 0, out)
    assert.equal(server.calls.length, expected)
  }
  const cached = path.join(r.file('tools'), 'culvert/1.2.3', platform, 'culvert')
  writeFileSync(cached, 'something else')
  assert.equal((await r.run('main', { coordinator, mirror: server.url })).code, 0)
  assert.equal(server.calls.length, 3, 'a cached program with another digest is not run')
  assert.equal(sha256(readFileSync(cached)), sha256(program))
})

test('a program with another digest is never run', { timeout: 60_000 }, async (t) => {
  const r = runner(t)
  const evil = await web(t, { [asset]: gz(stub({ up: { out: ready } }, r.file('calls'))) })
  r.release('1.2.3', 'a'.repeat(64))
  const { code, out } = await r.run('main', { coordinator: (await web(t, {})).url, mirror: evil.url })
  assert.equal(code, 1)
  assert.match(out, /its SHA-256 is not the pinned aaaa/)
  assert.equal(evil.calls.length, 4)
  assert.equal(r.read('calls'), '')
})

test('the coordinator has the client where the release cannot be had, and is believed no more', { timeout: 60_000 }, async (t) => {
  const from = `/dl/v1.2.3${asset}`
  const r = runner(t)
  const program = stub({ up: { out: ready } }, r.file('calls'))
  r.release('1.2.3', sha256(program))
  const away = await web(t, { [asset]: (_, res) => res.writeHead(503).end() })
  const evil = await web(t, { [from]: gz(stub({ up: { out: ready } }, r.file('evil'))) })
  const refused = await r.run('main', { coordinator: evil.url, mirror: (await web(t, {})).url })
  assert.equal(refused.code, 1)
  assert.match(refused.out, /HTTP 404/)
  assert.match(refused.out, /\/dl\/v1\.2\.3\/culvert-.*its SHA-256 is not the pinned/)
  assert.equal(r.read('evil'), '')
  const good = await web(t, { [from]: gz(program) })
  const { code, out } = await r.run('main', { coordinator: `${good.url}/`, mirror: away.url })
  assert.equal(code, 0, out)
  assert.match(out, new RegExp(`client from ${new URL(good.url).host}`))
  assert.deepEqual([away.calls.length, good.calls.length], [1, 1], 'each is asked once before any is asked again')
})

test('downloads are bounded and whole', { timeout: 120_000 }, async (t) => {
  for (const [handler, says] of [
    [(_, res) => res.end(Buffer.alloc(33 << 20)), /larger than any client/],
    [(_, res) => (res.writeHead(200, { 'content-length': 100 }), res.write('x'), setImmediate(() => res.destroy())), /cut off|aborted/],
    [(_, res) => res.writeHead(302, { location: asset }).end(), /too many redirects/],
    [(_, res) => res.end('no gzip'), /incorrect header/],
  ]) {
    const r = runner(t)
    r.release('1.2.3', 'a'.repeat(64))
    const server = await web(t, { [asset]: handler })
    const { code, out } = await r.run('main', { coordinator: (await web(t, {})).url, mirror: server.url })
    assert.equal(code, 1)
    assert.match(out, says)
    assert.ok(!existsSync(path.join(r.file('tools'), 'culvert/1.2.3', platform, 'culvert')))
  }
})

const status = { state: 'up', network: 'corp', gateway: 'gw`|x\n# evil', rules: ['deploy'], path: { kind: 'relay', rtt_ms: 12.34 }, rx_bytes: 1234567, tx_bytes: 10, more: 7, reached: [
  { proto: 'tcp', target: 'db.internal:5432', verdict: 'allowed', flows: 2, bytes_up: 10, bytes_down: 2000 },
  { proto: 'tcp', target: 'db.internal:1', verdict: 'allowed', flows: 1, cause: 'refused' },
  { proto: 'tcp', target: '10.0.0.9:22', verdict: 'denied', flows: 3, reason: 'x' }, { proto: 'dns', target: 'git.corp', verdict: 'denied', flows: 1 }] }

test('post writes the summary and ends the tunnel', async (t) => {
  const r = runner(t)
  await r.run('main', withBinary(r, { up: { out: ready }, status: { out: status }, down: { out: { state: 'ended' } } }))
  const { code, out } = await r.run('post')
  assert.equal(code, 0, out)
  assert.deepEqual(calls(r).map((c) => c.args[0]), ['up', 'status', 'down'])
  const text = r.read('summary')
  assert.match(text, /\| path \| `relay`, 12\.3 ms \|/)
  assert.match(text, /\| received, sent \| 1\.2 MB, 10 B \|/)
  assert.match(text, /\| `tcp db\.internal:5432` \| 2 \| 2\.0 kB, 10 B \|/)
  assert.match(text, /\| `tcp db\.internal:1` \| 1, the last: refused \| 0 B, 0 B \|/)
  assert.match(text, /\| `tcp 10\.0\.0\.9:22` \| 3 \| `allow: \["tcp 10\.0\.0\.9:22"\]` \|/)
  assert.match(text, /\| `the name git\.corp` \| 1 \| `allow: \["tcp git\.corp:PORT"\]` \|/)
  assert.match(text, /^7 flows to further targets\.$/m)
  assert.ok(!/^# evil/m.test(text), 'text of the other side is no markup')
  assert.ok(!out.includes('::warning'))
})

test('post never fails the job', async (t) => {
  for (const answers of [{ up: { out: ready }, status: { code: 1 }, down: { code: 1, out: { code: 'failed', detail: 'x\n::error::y' } } }, { up: { out: ready }, status: { out: 'nonsense' }, down: { code: 9 } }]) {
    const r = runner(t)
    await r.run('main', withBinary(r, answers))
    const { code, out } = await r.run('post')
    assert.equal(code, 0)
    assert.match(out, /^::warning title=culvert::the tunnel did not end/m)
    assert.ok(!/^::error/m.test(out))
  }
  const none = runner(t)
  assert.equal((await none.run('post')).code, 0, 'main never came to start a client')
  const gone = runner(t)
  const inputs = withBinary(gone, { up: { out: ready } })
  await gone.run('main', inputs)
  writeFileSync(inputs.binary, '')
  assert.equal((await gone.run('post')).code, 0)
})

test('a tunnel that has ended already is nothing to warn of', async (t) => {
  const r = runner(t)
  await r.run('main', withBinary(r, { up: { out: ready }, status: { code: 1 }, down: { code: 1, out: { code: 'not-up', detail: 'none' } } }))
  assert.ok(!(await r.run('post')).out.includes('::warning'))
})

test('the documented inputs are those that the action reads', () => {
  const yml = readFileSync(new URL('../../action.yml', import.meta.url), 'utf8')
  const documented = [...yml.slice(yml.indexOf('inputs:'), yml.indexOf('outputs:')).matchAll(/^ {2}([\w-]+):$/gm)].map((m) => m[1]).sort()
  const code = ['main', 'post', 'client'].map((f) => readFileSync(new URL(`../${f}.mjs`, import.meta.url), 'utf8')).join('\n')
  const readBy = [...new Set([...code.matchAll(/\b(?:input|list|flag)\('([\w-]+)'\)/g)].map((m) => m[1]))].sort()
  assert.deepEqual(readBy, documented)
})
