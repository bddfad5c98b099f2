-- wrk script: POST the JSON in $BODY with the key in $KEY; the outcome as one line of JSON on standard output.
-- "#00" in it becomes #00 to #63 in turn: as many prompts.
wrk.method, wrk.body = "POST", os.getenv("BODY")
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer " .. os.getenv("KEY")

if wrk.body:find("#00", 1, true) then
  local bodies, asked = {}, 0
  for number = 0, 63 do
    bodies[number] = wrk.body:gsub("#00", string.format("#%02d", number))
  end
  function request()
    asked = asked + 1
    return wrk.format(nil, nil, nil, bodies[asked % 64])
  end
end

function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('{"requests":%d,"seconds":%.6f,"bytes":%d,"p50":%.3f,"p99":%.3f,"status":%d,"connect":%d,"read":%d,"write":%d,"timeout":%d}\n',
    summary.requests, summary.duration / 1e6, summary.bytes, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    e.status, e.connect, e.read, e.write, e.timeout))
end
